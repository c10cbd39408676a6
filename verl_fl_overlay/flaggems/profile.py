"""A profile: which operators were measured to be faster from FlagGems, on one chip with one set of versions."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from verl_fl_overlay import packages
from verl_fl_overlay.devices.accelerator import chip_name
from verl_fl_overlay.errors import NOT_JSON, SettingsError
from verl_fl_overlay.files import write_whole

FORMAT = 1
SHIPPED = Path(__file__).parent / "profiles"
AUTO = "auto"


class ProfileError(SettingsError):
    """A profile that cannot be used: damaged, or measured on another chip or with other versions."""


@dataclass(frozen=True)
class Key:
    """The chip and the versions that a measurement is valid for; all of them must be the same."""

    chip: str
    torch: str
    triton: str
    flag_gems: str

    def __str__(self) -> str:
        return f"{self.chip}, torch {self.torch}, triton {self.triton}, flag_gems {self.flag_gems}"


@dataclass(frozen=True)
class Measurement:
    """One aten key in one step: how often it is called, and what a step spends in it, in milliseconds.

    A time is the larger one of the device's and the host's, and includes the operators that this one calls.  If there
    are many shapes, only the largest and the most frequent are timed; any other shape counts as the nearest of these.
    """

    key: str
    name: str
    calls: int
    native_ms: float
    flaggems_ms: float
    note: str = ""

    @property
    def faster(self) -> bool:
        """Whether FlagGems' kernel is faster by more than the measurement's noise, taken as 5 %."""
        return not self.note and self.flaggems_ms < 0.95 * self.native_ms


@dataclass(frozen=True)
class Profile:
    """What was measured, where, and the functions to route."""

    key: Key
    workload: str
    measurements: tuple[Measurement, ...] = ()
    chosen: tuple[str, ...] = ()
    step_ms: Mapping[str, float] = field(default_factory=dict)
    """Median time of whole steps: "native", "chosen"."""

    def save(self, file: Path) -> None:
        """Write the file completely or not at all."""
        write_whole(file, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")


def load(file: Path) -> Profile:
    """Read a profile.

    Raises:
        ProfileError: there is none, or it is damaged; says how to make one.
    """
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if data.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        key, measurements = Key(**data.pop("key")), tuple(Measurement(**each) for each in data.pop("measurements"))
        profile = Profile(key=key, measurements=measurements, **{**data, "chosen": tuple(data["chosen"])})
        if not isinstance(data["chosen"], list) or not all(isinstance(name, str) for name in profile.chosen):
            raise ValueError(f"chosen is not a list of names: {data['chosen']!r}")
        times = [time for one in measurements for time in (one.calls, one.native_ms, one.flaggems_ms)]
        for time in (*times, *profile.step_ms.values()):
            if not isinstance(time, int | float):
                raise ValueError(f"{time!r} is no number")
        return profile
    except OSError as error:
        raise ProfileError(f"the profile {file} cannot be read: {error}. verl-fl tune MODEL --out {file}") from error
    except (*NOT_JSON, TypeError, KeyError, AttributeError) as error:
        raise ProfileError(f"the profile {file} is damaged: {error}. Make it anew: verl-fl tune MODEL") from error


@functools.cache
def key_here() -> Key:
    """Return the key of this process's chip and packages."""
    import torch

    return Key(
        chip=chip_name(),
        torch=torch.__version__.partition("+")[0],
        triton=_version("triton"),
        flag_gems=_version("flag-gems"),
    )


def _version(distribution: str) -> str:
    return packages.version(distribution) or "none"


def find(setting: str) -> tuple[Profile, str] | None:
    """Return the profile that VERL_FL_PROFILE means, and where it is from; None if there is none for this chip.

    Args:
        setting: "auto" for a shipped profile that fits, "" for none, or a file.

    Raises:
        ProfileError: the named file is not finished, or does not fit; in that case the text shows both keys.
    """
    if not setting:
        return None
    if setting != AUTO:
        profile = load(Path(setting))
        if profile.key != key_here():
            raise ProfileError(
                f"the profile {setting} was measured on another chip or with other versions.\n"
                f"  it holds for: {profile.key}\n  this is:      {key_here()}\n"
                "  measure again: verl-fl tune MODEL --out FILE, or leave VERL_FL_PROFILE at auto"
            )
        if not profile.step_ms:
            raise ProfileError(
                f"the profile {setting} is not finished: what is faster was not decided. "
                f"Go on with it: verl-fl tune MODEL --out {setting}"
            )
        return profile, f"profile {setting}"
    for file in sorted(SHIPPED.glob("*.json")):
        profile = load(file)
        if profile.key == key_here():
            return profile, f"shipped profile {file.stem}"
    return None
