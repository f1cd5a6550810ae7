"""Running one model over the suites and storing what it says, item by item.

The only module of the audit that loads a model. One model is in memory at a time; between the
reference and the others waits a file with the reference's logits, for the KL. Everything is
appended to the record store, and what is already there is not computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from itertools import islice
from typing import Any

from realign.audit.canonical import prompt_hash, sha256_json, sha256_text
from realign.audit.instruments import Generation
from realign.audit.outcomes import Response
from realign.audit.records import (
    KL_POSITIONS,
    LOGODDS_TOKENS,
    Demand,
    KlRecord,
    OpenedRole,
    RoleRecords,
    scorer_hash,
)
from realign.audit.request import AuditRequest
from realign.audit.store import RecordFile, RecordStore
from realign.audit.suites import Suite
from realign.errors import MismatchError
from realign.model.chat import encode
from realign.model.devices import pick_device
from realign.model.generation import Reply, generate
from realign.model.loading import LoadedModel, load_model
from realign.model.scoring import (
    ReferenceTrace,
    kl_to_reference,
    record_reference,
    refusal_logodds,
)
from realign.progress import Progress

_SCORED_AT_ONCE = 64


class Collector:
    """Collects the records of all roles, one after another; close it to drop temporary files."""

    def __init__(
        self, request: AuditRequest, demand: Demand, store: RecordStore, *, progress: Progress
    ) -> None:
        self._request = request
        self._demand = demand
        self._store = store
        self._progress = progress
        self._traces: dict[str, ReferenceTrace] = {}
        self._reference_digest: str | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def collect(self, opened: OpenedRole, *, followers: Sequence[OpenedRole]) -> RoleRecords:
        """Run one model as far as its records are missing.

        Args:
            opened: the model.
            followers: for the reference, the models whose KL from it is still to come.

        Raises:
            ModelError: the model cannot be loaded or asked.
            OutputError: a record cannot be written.
        """
        is_reference = opened.role == "reference"
        if is_reference:
            self._reference_digest = opened.digest
        job = _RoleJob(self._request, self._demand, self._store, opened)
        trace_needed = is_reference and any(self._kl_missing(follower) for follower in followers)
        with ExitStack() as stack:
            job.open(stack)
            if not is_reference and self._reference_digest is not None:
                job.open_kl(stack, reference_digest=self._reference_digest)
            if job.complete and not trace_needed:
                self._progress.note(f"{opened.role}: all results reused")
                return job.finish()
            self._progress.note(f"loading {opened.role}: {opened.checkpoint.source}")
            loaded = stack.enter_context(
                load_model(
                    opened.checkpoint, device=self._request.device, dtype=self._request.dtype
                )
            )
            job.run(loaded, traces=self._traces, progress=self._progress)
            if trace_needed:
                self._record_traces(loaded, job)
            return job.finish()

    def _kl_missing(self, opened: OpenedRole) -> bool:
        assert self._reference_digest is not None
        for suite in self._demand.kl:
            with _kl_file(
                self._request, self._store, opened, suite, reference_digest=self._reference_digest
            ) as file:
                if "all" not in file.known:
                    return True
        return False

    def _record_traces(self, loaded: LoadedModel, job: _RoleJob) -> None:
        for suite in self._demand.kl:
            self._progress.note(f"reference distributions on {suite.name}")
            trace = record_reference(
                loaded,
                [item.prompt for item in suite.items],
                replies=job.replies_for(suite),
                k=KL_POSITIONS,
                folder=self._store.folder,
                batch_size=self._request.batch_size,
                progress=self._progress,
            )
            self._stack.callback(trace.close)
            self._traces[suite.name] = trace


class _RoleJob:
    """The files of one role and the work still to do in them."""

    def __init__(
        self, request: AuditRequest, demand: Demand, store: RecordStore, opened: OpenedRole
    ) -> None:
        self._request = request
        self._demand = demand
        self._store = store
        self._opened = opened
        self._facts: RecordFile | None = None
        self._texts: dict[tuple[str, bool], RecordFile] = {}
        self._odds: dict[str, RecordFile] = {}
        self._kl: dict[str, RecordFile] = {}
        self._reused = 0

    def open(self, stack: ExitStack) -> None:
        """Open every file and load what earlier runs left."""
        key: dict[str, Any] = {"model": self._opened.digest, **conditions(self._request)}
        role = self._opened.role
        self._facts = stack.enter_context(
            self._store.file(role=role, kind="facts", suite="all", key=key)
        )
        for suite in self._demand.texts:
            generation = self._request.generation_of(suite)
            again = (False, True) if self._wants_again else (False,)
            for single in again:
                self._texts[suite.name, single] = stack.enter_context(
                    self._store.file(
                        role=role,
                        kind="text-single" if single else "text",
                        suite=suite.name,
                        key=key
                        | {"generation": generation.settings, "single": single}
                        | ({"batch_size": 1} if single else {}),
                    )
                )
        for suite in self._demand.scored:
            scorer = scorer_hash(per_byte=self._demand.per_byte)
            self._odds[suite.name] = stack.enter_context(
                self._store.file(
                    role=role, kind="logodds", suite=suite.name, key=key | {"scorer": scorer}
                )
            )
        self._reused = sum(
            len(self._present(suite, file.known)) for suite, file in self._text_and_score_files()
        )

    def open_kl(self, stack: ExitStack, *, reference_digest: str) -> None:
        """Open the KL files, whose key also names the reference."""
        for suite in self._demand.kl:
            self._kl[suite.name] = stack.enter_context(
                _kl_file(
                    self._request,
                    self._store,
                    self._opened,
                    suite,
                    reference_digest=reference_digest,
                )
            )

    @property
    def _wants_again(self) -> bool:
        return self._request.noise_floor and self._opened.role == "reference"

    @property
    def complete(self) -> bool:
        """Whether nothing is left to compute."""
        assert self._facts is not None
        return (
            "all" in self._facts.known
            and all(
                len(self._present(suite, file.known)) == len(suite.items)
                for suite, file in self._text_and_score_files()
            )
            and all("all" in file.known for file in self._kl.values())
        )

    def run(
        self, loaded: LoadedModel, *, traces: Mapping[str, ReferenceTrace], progress: Progress
    ) -> None:
        """Compute and store what is missing."""
        assert self._facts is not None
        self._facts.add("all", _facts(loaded) | {"batch_size": self._request.batch_size})
        for suite in self._demand.texts:
            generation = self._request.generation_of(suite)
            for single in (False, True) if self._wants_again else (False,):
                self._generate(
                    loaded,
                    suite,
                    generation,
                    file=self._texts[suite.name, single],
                    batch_size=1 if single else self._request.batch_size,
                    progress=progress,
                )
        for suite in self._demand.scored:
            self._score(loaded, suite, progress=progress)
        for suite in self._demand.kl:
            if suite.name in self._kl and "all" not in self._kl[suite.name].known:
                self._diverge(loaded, suite, trace=traces[suite.name], progress=progress)

    def _generate(
        self,
        loaded: LoadedModel,
        suite: Suite,
        generation: Generation,
        *,
        file: RecordFile,
        batch_size: int,
        progress: Progress,
    ) -> None:
        present = self._present(suite, file.known)
        missing = [item for item in suite.items if item.id not in present]
        if not missing:
            return
        progress.note(f"{self._opened.role}: {len(missing)} answers to {suite.name}")
        prompts = [encode(loaded.tokenizer, item.prompt) for item in missing]
        replies = generate(
            loaded,
            prompts,
            max_new_tokens=generation.max_new_tokens,
            batch_size=batch_size,
            progress=progress,
        )
        for reply in replies:
            item = missing[reply.prompt_index]
            file.add(
                item.id,
                {
                    "prompt": sha256_text(item.prompt),
                    "prompt_hash": prompt_hash(prompts[reply.prompt_index]),
                    "response": reply.text,
                    "token_ids": list(reply.token_ids),
                    "finished": reply.finished,
                },
            )

    def _score(self, loaded: LoadedModel, suite: Suite, *, progress: Progress) -> None:
        file = self._odds[suite.name]
        present = self._present(suite, file.known)
        missing = iter([item for item in suite.items if item.id not in present])
        while chunk := list(islice(missing, _SCORED_AT_ONCE)):
            scores = refusal_logodds(
                loaded,
                [item.prompt for item in chunk],
                k=LOGODDS_TOKENS,
                per_byte=self._demand.per_byte,
                # A few positions each, and no cache that grows: more fit than in generation.
                batch_size=4 * self._request.batch_size,
                progress=progress,
            )
            values = scores.values or (None,) * len(chunk)
            for item, value in zip(chunk, values, strict=True):
                file.add(
                    item.id,
                    {"prompt": sha256_text(item.prompt), "value": value, "reason": scores.reason},
                )

    def _diverge(
        self, loaded: LoadedModel, suite: Suite, *, trace: ReferenceTrace, progress: Progress
    ) -> None:
        try:
            curve = kl_to_reference(
                loaded, trace, batch_size=self._request.batch_size, progress=progress
            )
        except MismatchError as error:
            self._kl[suite.name].add("all", {"reason": error.message})
            return
        self._kl[suite.name].add(
            "all",
            {
                "items": {
                    item.id: list(values)
                    for item, values in zip(suite.items, curve.per_prompt, strict=True)
                },
                "clamped": curve.clamped,
                "dropped": max(curve.dropped_reference, curve.dropped_subject),
            },
        )

    def replies_for(self, suite: Suite) -> list[Reply] | None:
        """The stored replies to a suite, where they reach far enough for the KL."""
        file = self._texts.get((suite.name, False))
        if file is None:
            return None
        rows = [file.known[item.id] for item in suite.items]
        if not all(row["finished"] or len(row["token_ids"]) >= KL_POSITIONS for row in rows):
            return None
        return [
            Reply(index, row["response"], tuple(row["token_ids"]), row["finished"])
            for index, row in enumerate(rows)
        ]

    def finish(self) -> RoleRecords:
        """All records of the role, from the files."""
        assert self._facts is not None
        records = RoleRecords(
            role=self._opened.role, facts=self._facts.known["all"], reused=self._reused
        )
        for suite in self._demand.texts:
            records.responses[suite.name] = _responses(suite, self._texts[suite.name, False])
            if self._wants_again:
                records.again[suite.name] = _responses(suite, self._texts[suite.name, True])
        for suite in self._demand.scored:
            rows = self._odds[suite.name].known
            values = {item.id: rows[item.id]["value"] for item in suite.items}
            records.logodds[suite.name] = {k: v for k, v in values.items() if v is not None}
            if not records.logodds[suite.name]:
                records.logodds_reason = str(rows[suite.items[0].id]["reason"])
        for name, file in self._kl.items():
            row = file.known["all"]
            if "reason" in row:
                records.kl_reason = str(row["reason"])
            else:
                records.kl[name] = KlRecord(row["items"], row["clamped"], row["dropped"])
        return records

    def _text_and_score_files(self) -> Iterator[tuple[Suite, RecordFile]]:
        by_name = {suite.name: suite for suite in (*self._demand.texts, *self._demand.scored)}
        for (name, _), file in self._texts.items():
            yield by_name[name], file
        for name, file in self._odds.items():
            yield by_name[name], file

    @staticmethod
    def _present(suite: Suite, known: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Ids whose record was made from the very same prompt."""
        return {
            item.id
            for item in suite.items
            if item.id in known and known[item.id]["prompt"] == sha256_text(item.prompt)
        }


def conditions(request: AuditRequest) -> dict[str, Any]:
    """What else the numbers of a model depend on: records made under others are made again.

    Greedy text is not stable over batch sizes, kernels and library versions (2506.17209).
    """
    return {
        "batch_size": request.batch_size,
        "device": pick_device(request.device).type,
        "dtype": str(request.dtype or "on disk"),
        "libraries": {name: metadata.version(name) for name in ("torch", "transformers")},
    }


def _kl_file(
    request: AuditRequest,
    store: RecordStore,
    opened: OpenedRole,
    suite: Suite,
    *,
    reference_digest: str,
) -> RecordFile:
    key = conditions(request) | {
        "model": opened.digest,
        "reference": reference_digest,
        "positions": KL_POSITIONS,
        "suite": suite.suite_hash,
    }
    return store.file(role=opened.role, kind="kl", suite=suite.name, key=key)


def _responses(suite: Suite, file: RecordFile) -> tuple[Response, ...]:
    rows = [file.known[item.id] for item in suite.items]
    return tuple(Response(row["response"], row["prompt_hash"], row["finished"]) for row in rows)


def _facts(loaded: LoadedModel) -> dict[str, Any]:
    vocabulary = loaded.tokenizer.get_vocab()
    return {
        "attention": loaded.attention,
        "chat_template_sha256": loaded.chat_template_sha256,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "stop_ids": list(loaded.stop_ids),
        "tokenizer_digest": sha256_json(vocabulary),
    }
