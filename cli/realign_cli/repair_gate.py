"""The gate of `realign repair --audit`: the output is audited before it gets its name.

Here: running the audit on the finished output in its temporary folder, and refusing to commit what
the policy's gates do not pass. Not here: the command and its options (`commands.repair`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from realign.errors import GateFailedError
from realign_cli.commands.audit import command_line, load_suites
from realign_cli.sink import Sink

if TYPE_CHECKING:
    from realign.audit.schema import GateEntry, Report
    from realign.repair.request import RepairRequest


class RepairGate:
    """Audits the finished output in its temporary folder; raises if the gates do not pass."""

    def __init__(
        self, sink: Sink, request: RepairRequest, *, folder: Path, options: dict[str, Any]
    ) -> None:
        from realign.audit.policy import load_policy, require_gate

        # Whatever is wrong with suites or policy must show before the repair, not after it.
        self._policy = None if options["policy"] is None else load_policy(options["policy"])
        if self._policy is not None:
            require_gate(self._policy)
        self._suites = load_suites(options["suites"], offline=request.offline)
        self._options = options
        self._sink = sink
        self._request = request
        self.folder = folder
        self.report: Report | None = None

    def __call__(self, temporary: Path) -> None:
        """Audit the output in its temporary folder.

        Raises:
            GateFailedError: a required gate did not pass; the output must not be committed.
        """
        from realign.audit.request import AuditRequest
        from realign.audit.run import run_audit
        from realign.report.files import write_report_files
        from realign_cli.commands.audit import manifest_of

        options, request = self._options, self._request
        self.report = run_audit(
            AuditRequest(
                subject=str(request.finetuned),
                reference=request.aligned,
                repaired=temporary,
                base=request.base,
                suites=self._suites,
                judges=tuple(options["judges"] or ()),
                policy=self._policy,
                calibration=_calibration(request, temporary),
                out=self.folder,
                seed=request.seed,
                device=request.device,
                limit=options["limit"],
                max_new_tokens=options["max_new_tokens"],
                command=command_line(),
                offline=request.offline,
                batch_size=options["batch_size"],
            ),
            progress=self._sink.progress,
        )
        write_report_files(self.report, self.folder, manifest=manifest_of(temporary))
        if self.report.exit_code != 0:
            self.show()
            failed = [g.id for g in self.report.gates if g.required and g.status != "pass"]
            reason = f"the repair is not kept: {', '.join(failed) or 'a gate'} did not pass"
            self._sink.document(
                {
                    "output": None,
                    "picture": None,
                    "manifest": None,
                    "audit": str(self.folder / "audit.json"),
                    "gates": self.gates(),
                    "exit": {"code": GateFailedError.exit_code, "reason": reason},
                }
            )
            raise GateFailedError(
                reason,
                f"see {self.folder / 'report.html'}; a smaller or larger --strength, other "
                "settings or another method may pass",
            )

    def gates(self) -> list[dict[str, Any]]:
        """Return the gates as JSON."""
        assert self.report is not None
        return [gate.model_dump(mode="json", by_alias=True) for gate in self.report.gates]

    def undecided(self) -> list[GateEntry]:
        """Return the required gates that the data could not decide."""
        assert self.report is not None
        return [g for g in self.report.gates if g.required and g.status == "inconclusive"]

    def show(self) -> None:
        """Show the audit on the terminal."""
        from realign.report.terminal import render

        assert self.report is not None
        self._sink.show(*render(self.report, width=self._sink.out.width), "")
        self._sink.line(str(self.folder / "report.html"))


def _calibration(request: RepairRequest, folder: Path) -> tuple[Any, ...]:
    """The anchors, where the repair asked them; texts are compared with the suites by the plan."""
    from realign.checkpoint.manifest import read_manifest
    from realign.repair.plan_anchors import load_anchors

    manifest = read_manifest(folder)
    if manifest is None or manifest["anchors"] is None:
        return ()
    return (load_anchors(request.anchors),)
