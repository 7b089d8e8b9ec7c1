"""A row of the table of Aurora-M's sources."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from aurora_jax.data.text.documents import DocumentStep
from aurora_jax.data.text.sources import Format, Kind

CAP, CAT = ("cap",), ("cat",)
BOTH = CAP + CAT


@dataclass(frozen=True)
class Entry:
    """A source of Aurora-M: a row of the table."""

    name: str
    origin: str
    """Its folder under the data root: the name on the hub."""
    files: tuple[str, ...]
    """Patterns in that folder."""
    format: Format
    language: str
    """en, fi, hi, ja, vi, code, or mul where records differ."""
    kind: Kind
    stages: tuple[str, ...]
    license: str
    """As its publisher states it."""
    billions: float
    """Tokens of StarCoder's vocabulary, an order of magnitude (memory): rates follow it within a group."""
    text: str | None = "text"
    fields: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[DocumentStep, ...] = ()
    validation: tuple[str, ...] = ()
    """Patterns of its own held-out part, where it has one."""
    note: str = ""

    @property
    def group(self) -> str:
        """The row of `rates.SHARES` that it belongs to."""
        if self.kind == "web":
            return f"web_{self.language}"
        return self.name if self.kind == "code" else self.kind

    def task(self, stage: str) -> str:
        """The name of its task in a stage."""
        return f"aurora_{self.name}{'_cat' if stage == 'cat' and self.is_raw_text else ''}"

    @property
    def is_raw_text(self) -> bool:
        """Whether it is neither code nor instructions: the second stage drops symbol-heavy documents of it."""
        return self.kind in ("web", "encyclopedia", "domain")
