"""A profile as a picture; it needs matplotlib, and nothing that measuring needs."""

from __future__ import annotations

from pathlib import Path

from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.flaggems.profile import Profile


def plot(profile: Profile, file: Path) -> None:
    """Draw what a step spends in each operator, native and as chosen, as a PNG.

    Raises:
        OverlayError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = sorted(profile.measurements, key=lambda one: -one.native_ms)[:15]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), width_ratios=(4, 1), layout="constrained")
    places = range(len(shown))
    left.barh([p + 0.2 for p in places], [one.native_ms for one in shown], 0.4, label="native")
    left.barh([p - 0.2 for p in places], [one.flaggems_ms for one in shown], 0.4, label="FlagGems")
    left.set_yticks(places, [one.key + (" (chosen)" if one.name in profile.chosen else "") for one in shown])
    left.invert_yaxis()
    left.set_xlabel("milliseconds a step")
    left.legend()
    right.bar(list(profile.step_ms), list(profile.step_ms.values()))
    right.set_ylabel("whole step, milliseconds")
    figure.suptitle(f"{profile.workload}\n{profile.key}", fontsize=9)
    try:
        figure.savefig(file, dpi=120, format="png")
    except OSError as error:
        raise OverlayError(f"--plot {file} cannot be written: {error.strerror}") from error
    finally:
        pyplot.close(figure)
