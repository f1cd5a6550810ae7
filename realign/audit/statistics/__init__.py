"""Intervals, tests, verdicts and power for paired comparisons of two models.

intervals     one rate: Wilson, Clopper-Pearson
paired        two models on the same items: the 2x2 table, McNemar, Tango, Newcombe
resampling    continuous or clustered differences: bootstrap, sign-flip, cluster standard error
evidence      one comparison of one instrument, brought to an interval and a p-value
multiplicity  Holm, and one decision over several suites
verdicts      drift found / within the declared margin / not enough data to say
power         what n items can detect and certify, before anything runs
agreement     two judges against each other, one judge against hand labels
"""
