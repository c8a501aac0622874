"""What a check found, and the step that would mend it. Pure."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

TEMPORARY = ".repair-"
"""How a file begins that a repair is writing: nothing else looks at it, and the same repair writes it again."""


class Severity(Enum):
    """How bad a finding is."""

    NOTE = "note"
    """Part of normal life, a crash included: the daemon sees to it."""
    WARNING = "warning"
    """A person should know; nothing that can be read is lost by it."""
    DAMAGE = "damage"
    """Bytes are not what they should be, or records would be lost if nobody did anything."""


class Step(Enum):
    """What `fsck repair --apply` can do. Each is carried out in `mend`."""

    SET_ASIDE = "move to quarantine"
    RENAME = "rename"
    REBUILD = "rebuild the segment's header"
    RESPOOL = "write a spool file of the frames that can be read"
    EXPLAIN = "write the missing .reason"


@dataclass(frozen=True)
class Mend:
    """One step of a repair. The original always ends in quarantine/, unless the step is a mere rename."""

    step: Step
    path: Path
    target: Path
    """Where the file goes, or the new one appears."""
    reason: str
    """What the `.reason` beside the evidence says."""
    head: bytes = b""
    """For RESPOOL: the start frame of the writer, where the file's own cannot be read."""

    def told(self) -> str:
        """Return the step in words."""
        kept = "; the original goes to quarantine/" if self.step in (Step.REBUILD, Step.RESPOOL) else ""
        return f"{self.step.value}: {self.target}{kept}"


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    severity: Severity
    path: Path
    what: str
    daemon: str
    """What the daemon does about it by itself."""
    mend: Mend | None = None
    """What `fsck repair` would do; None: nothing, for the daemon heals it or nobody can."""

    def as_json(self) -> dict[str, object]:
        """Return it as `--json` prints it."""
        repair = None if self.mend is None else {"step": self.mend.step.value, "target": str(self.mend.target)}
        return {
            "severity": self.severity.value, "file": str(self.path), "what": self.what, "daemon": self.daemon,
            "repair": repair,
        }  # fmt: skip
