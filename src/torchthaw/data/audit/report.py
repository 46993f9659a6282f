"""What an audit found, as plain data: findings, each with a verdict and what to do, and a verdict over all."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["pass", "warn", "fail"]
_ORDER: tuple[Verdict, ...] = ("pass", "warn", "fail")


@dataclass(frozen=True)
class Finding:
    """One thing that the audit found.

    Attributes:
        name: What kind of thing, such as `exact duplicates across splits`.
        verdict: `fail` if figures of the model could not be trusted, or training would break; `warn` if somebody
            should look; `pass` for what is only told.
        count: How many images, groups, classes or properties.
        summary: What was found, in a sentence.
        advice: What to do: a command or a line of a recipe where one mends it.
        items: All of it, as plain data; each with the paths it is about.
    """

    name: str
    verdict: Verdict
    count: int
    summary: str
    advice: str | None = None
    items: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes:
        findings: The worst first.
        num_images: Images by split.
        checks: What was looked at.
        not_checked: What was not, and why.
        seconds: How long each step took.
        copies: Paths of images that are copies of each other, exactly or nearly; `split_dataset(together=...)` keeps
            them in one split.
    """

    findings: tuple[Finding, ...]
    num_images: dict[str, int]
    checks: tuple[str, ...]
    not_checked: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    copies: tuple[tuple[str, ...], ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The worst of all findings' verdicts."""
        return worst(finding.verdict for finding in self.findings)

    @property
    def suspicious_labels(self) -> tuple[int, int] | None:
        """Number of images with suspicious labels, and of those looked at; None where these were not looked for."""
        if "suspicious labels" not in self.checks:
            return None
        found = [finding.count for finding in self.findings if finding.name == "suspicious labels"]
        return sum(found), sum(self.num_images.values())

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `audit.json`."""
        return {
            "verdict": self.verdict,
            "num_images": self.num_images,
            "findings": [
                {
                    "name": finding.name,
                    "verdict": finding.verdict,
                    "count": finding.count,
                    "summary": finding.summary,
                    "advice": finding.advice,
                    "items": list(finding.items),
                }
                for finding in self.findings
            ],
            "checks": list(self.checks),
            "not_checked": self.not_checked,
            "seconds": {step: round(seconds, 3) for step, seconds in self.seconds.items()},
        }


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Returns the worst of some verdicts; `pass` if there are none."""
    return max(verdicts, key=_ORDER.index, default="pass")


def worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Sorts findings: those that fail first; otherwise the order stays."""
    return tuple(sorted(findings, key=lambda finding: -_ORDER.index(finding.verdict)))
