"""The overlay on one verl: its settings, its hooks and its features, started and stopped together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

from verl_fl_overlay import events
from verl_fl_overlay.compat import Shim, pins
from verl_fl_overlay.errors import SettingsError, nearest
from verl_fl_overlay.features import Features
from verl_fl_overlay.files import RegularFile
from verl_fl_overlay.hooks import Hook, HookSet
from verl_fl_overlay.phase import training
from verl_fl_overlay.settings import Settings


class Overlay:
    """What was chosen for the verl that is here, what in the settings has no effect, the hooks and the features."""

    def __init__(self, settings: Settings, shim: Shim, conflicts: Sequence[str] = ()) -> None:
        """Prepare; nothing is installed yet.

        Raises:
            SettingsError: VERL_FL_DISABLE names a hook that does not exist.
        """
        self.settings = settings
        self.conflicts = conflicts
        self.shim = shim
        self.features = Features(settings)
        self.hooks = HookSet(
            shim.hooks,
            disabled={**shim.left_out, **_disabled(settings, shim.hooks, self.features.off)},
            absent=shim.absent,
            strict=settings.strict,
            verify=pins.verify,
        )
        self.report_file: RegularFile | None = None
        """The report of this process, if VERL_FL_REPORT_DIR asks for one."""
        self.undo = ExitStack()
        """What else has to be taken back when the overlay stops."""

    def start(self) -> None:
        """Install the hooks and start the features; if one of them fails, undo all of it."""
        events.failures.begin(self.settings.strict)
        with ExitStack() as undo:
            undo.callback(events.failures.begin, strict=False)
            undo.callback(training.forget)
            undo.callback(self.hooks.remove)
            self.hooks.install()
            undo.callback(self.features.stop)
            self.features.start()
            self.undo = undo.pop_all()

    def stop(self) -> None:
        """Stop the features and remove the hooks; the hooks are removed even if a feature raises."""
        self.undo.close()


def unknown_hooks(settings: Settings, hooks: Iterable[Hook]) -> list[str]:
    """Return the names in VERL_FL_DISABLE that are none of ``hooks``, each with the nearest ones."""
    known = {hook.name for hook in hooks}
    unknown = (name for name in settings.disable if name != "*" and name not in known)
    return [f"{name!r}{nearest(name, known, 3, ': did you mean {}?')}" for name in unknown]


def _disabled(settings: Settings, hooks: Iterable[Hook], off: Mapping[str, str]) -> dict[str, str]:
    """Return the hooks to leave out, each with the reason; ``off`` has the features that are off."""
    known = [hook.name for hook in hooks]
    if unknown := unknown_hooks(settings, hooks):
        lines = "".join(f"  {text}\n" for text in unknown)
        raise SettingsError(
            f"VERL_FL_DISABLE names hooks that do not exist for this verl:\n{lines}  allowed: *, {', '.join(known)}"
        )
    with_feature = {hook.name: off[hook.feature] for hook in hooks if hook.feature in off}
    by_name = known if "*" in settings.disable else settings.disable
    with_it = {h.name: f"left out with {h.pair}, which VERL_FL_DISABLE names" for h in hooks if h.pair in by_name}
    return {**with_feature, **with_it, **dict.fromkeys(by_name, "left out by VERL_FL_DISABLE")}
