"""Hooks: wrappers around functions of other packages, their installation and their removal.

Nothing here knows verl.  A ``Hook`` says where and why.  A ``HookSet`` installs its hooks when somebody imports their
modules (it imports none itself), counts their calls, reports their state and removes them exactly.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from types import FunctionType, ModuleType
from typing import Any

import wrapt

from verl_fl_overlay.errors import HookError

logger = logging.getLogger("verl_fl_overlay")

Call = Callable[..., Any]
"""A function of another package."""

Wrapper = Callable[[Call, Any, tuple[Any, ...], dict[str, Any]], Any]
"""Called in place of the target with (wrapped, instance, args, kwargs); returns what the caller gets."""

Verify = Callable[["Hook", Any], None]
"""Called with a hook and its target before it is wrapped; raises if the target is not what the hook was written for."""


@dataclass(frozen=True)
class Hook:
    """One function of another package, and what we put around it.

    ``why`` says what the package does and what we change, ``upstream`` links the place, ``until`` says what would make
    the hook unnecessary: the table in docs/hooks.md and ``doctor`` show these.  ``needs`` names a package that the
    module imports; without it the hook may wait for ever, and that is no fault.  ``relies_on`` lists, as
    ``module:attribute``, what the wrapper reads, calls or subclasses beside its target.  ``pair`` names the counterpart
    of this hook: one undoes what the other does.  If a user leaves the counterpart out by name, this one is out too.
    """

    name: str
    module: str
    attribute: str
    wrapper: Wrapper
    feature: str
    required: bool
    why: str
    upstream: str
    until: str
    needs: str = ""
    relies_on: tuple[str, ...] = ()
    pair: str = ""

    @property
    def target(self) -> str:
        """``module:attribute``."""
        return f"{self.module}:{self.attribute}"


class State(str, Enum):
    """Where a hook stands."""

    WAITING = "waiting"
    """Its module has not been imported (if it never is, the name may be wrong)."""
    INSTALLED = "installed"
    DISABLED = "disabled"
    """Left out by name, or because its feature was not asked for."""
    FAILED = "failed"
    """Its module is there, but the hook could not be put on it; ``detail`` says why."""
    REMOVED = "removed"


@dataclass
class HookStatus:
    """A hook's state, the reason for it, and how often its wrapper was called in this process."""

    hook: Hook
    state: State = State.WAITING
    detail: str = ""
    calls: int = 0


@dataclass
class _Installed:
    """What an exact removal needs: the place of the wrapper, and the wrapper itself.

    A wrapper in another package's closure cannot be taken out; ``live`` = False turns it off instead.
    """

    parent: Any
    name: str
    handle: Any = None
    live: bool = True

    def lost(self, hook: Hook) -> bool:
        """Tell whether the module was executed again, so that its new definitions have no wrapper."""
        try:
            parent, _, found = wrapt.resolve_path(sys.modules[hook.module], hook.attribute)
        except (KeyError, wrapt.PathResolutionError):
            return False  # nobody can reach the target
        if found is self.handle:  # also if a subclass has replaced the class
            return False
        if parent is not self.parent:
            return True
        # A reloaded module stays the same object.  Anything but the bare function may be a wrapper on top of ours.
        return type(found) is FunctionType and found.__code__ == getattr(self.handle, "__code__", None)


_PLACE = ("__module__", "__qualname__")


class _BoundWrapper(wrapt.BoundFunctionWrapper):  # type: ignore[type-arg]
    """A method that has a hook, of an instance or of the class."""

    __copy__: Any = None  # copied as it is pickled
    __deepcopy__: Any = None

    def __getattribute__(self, name: str) -> Any:
        return getattr(self._self_parent, name) if name in _PLACE else super().__getattribute__(name)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        owner = getattr(self.__wrapped__, "__self__", None)
        if owner is None:
            return self._self_parent.__reduce_ex__(protocol)  # type: ignore[no-any-return]
        return getattr, (owner, self.__qualname__.rpartition(".")[2])


class _Wrapper(wrapt.FunctionWrapper):  # type: ignore[type-arg]
    """A wrapper that is pickled as the place of its hook: unpickling gives what is there in that process.

    It calls itself by that place, and not by the one where the function in it is defined: cloudpickle looks there, and
    sends a copy of the function, without the hook, if it does not find the wrapper itself.
    """

    __bound_function_wrapper__ = _BoundWrapper
    __copy__: Any = None
    __deepcopy__: Any = None

    def __init__(self, wrapped: Call, wrapper: Wrapper, hook: Hook, parent: Any) -> None:
        super().__init__(wrapped, wrapper)
        self._self_place = dict(zip(_PLACE, (hook.module, hook.attribute), strict=True))
        self._self_unbound = super().__get__(None, parent) if isinstance(parent, type) else self

    def __getattribute__(self, name: str) -> Any:
        return self._self_place[name] if name in _PLACE else super().__getattribute__(name)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        free = self._self_binding == "staticmethod" or (instance is None and self._self_binding != "classmethod")
        return self._self_unbound if free else super().__get__(instance, owner)  # the same one each time, like Python

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return pkgutil.resolve_name, (f"{self.__module__}:{self.__qualname__}",)


def being_imported(module: ModuleType) -> bool:
    """Return whether a thread is still executing ``module``, so that it may not have all its names yet."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def call_again_on_import(module: ModuleType, callback: Callable[[ModuleType], None]) -> None:
    """Register ``callback`` for the import of ``module`` once more.

    If a callback raises, the import system drops the module; a second import must raise again.
    """
    if not being_imported(module):
        return
    name = module.__name__
    sys.modules.pop(name, None)  # for a module that is there wrapt would call back at once
    try:
        wrapt.when_imported(name)(callback)
    finally:
        sys.modules[name] = module


class HookSet:
    """Installs hooks lazily, a group at a time, and takes them back.

    The hooks of one feature in one module are a group: all of them are installed or none.  If a required hook fails
    (under ``strict``: any hook), the whole set is taken off.  Then the import of the module raises ``HookError``, and
    so does every later import until ``remove``.  So nobody trains with half an overlay.
    """

    def __init__(
        self,
        hooks: Iterable[Hook],
        *,
        disabled: Mapping[str, str] | None = None,
        absent: Mapping[str, str] | None = None,
        strict: bool = False,
        verify: Verify | None = None,
    ) -> None:
        """Take the hooks.

        ``disabled`` are hooks to leave out, name -> reason.  ``absent`` are hooks on modules that do not exist, name ->
        explanation.  ``verify`` is called with a hook and its target before the target is wrapped.
        """
        self._status = {hook.name: HookStatus(hook) for hook in hooks}
        for name, reason in (disabled or {}).items():
            self._status[name].state = State.DISABLED
            self._status[name].detail = reason
        self._absent = absent or {}
        self._strict = strict
        self._verify = verify
        self._installed: dict[str, _Installed] = {}
        self._registered: set[str] = set()
        self._active = False
        self._refusal: HookError | None = None
        self._lock = threading.RLock()

    @property
    def refusal(self) -> HookError | None:
        """The failure that took the whole set off, if there was one."""
        return self._refusal

    def report(self) -> list[HookStatus]:
        """Return the status of every hook, in the order given."""
        return [self._as_it_is(status) for status in self._status.values()]

    def _as_it_is(self, status: HookStatus) -> HookStatus:
        place = self._installed.get(status.hook.name)
        if place is None or not place.lost(status.hook):
            return status
        return replace(status, state=State.FAILED, detail="its module was imported anew since, and is without the hook")

    def install(self) -> None:
        """Install each hook if its module is imported, else register it for the import; a second call changes nothing.

        Raises:
            HookError: a required hook does not fit its target, or its module is absent; nothing is left installed.
        """
        with self._lock:
            self._active = True
            for status in self._status.values():
                if status.state is State.REMOVED:
                    status.state, status.detail = State.WAITING, ""
            for name, reason in self._absent.items():
                if self._status[name].state is State.WAITING:
                    self._fail([self._status[name]], self._status[name], HookError(reason))
            waiting = dict.fromkeys(s.hook.module for s in self._status.values() if s.state is State.WAITING)
            registered = [module for module in waiting if module not in self._registered]
            present = [module for module in waiting if module in self._registered]
            self._registered.update(registered)
        # Outside the lock: this handles imported modules at once, and waits for a module that another thread is
        # importing; that thread may itself be waiting for this lock.
        for name in registered:
            wrapt.when_imported(name)(self._module_imported)
        for name in present:
            module = sys.modules.get(name)
            if module is not None:
                self._module_imported(module)

    def remove(self) -> None:
        """Take every hook off its target again, also from under wrappers that others put on top of it."""
        with self._lock:
            self._active = False
            self._take_off()

    def _take_off(self) -> None:
        for status in reversed(self._status.values()):
            if status.state is State.INSTALLED:
                self._unwrap(status)
            if status.state in (State.INSTALLED, State.WAITING):
                status.state, status.detail = State.REMOVED, ""

    def _module_imported(self, module: ModuleType) -> None:
        if being_imported(module):
            importlib.import_module(module.__name__)  # waits, if another thread is still executing the module
        with self._lock:
            if not self._active:
                return  # removed; another set may be installed by now
            groups: dict[str, list[HookStatus]] = {}
            for status in self._status.values():
                if status.hook.module == module.__name__ and status.state is State.WAITING:
                    groups.setdefault(status.hook.feature, []).append(status)
            try:
                if self._refusal is not None:
                    raise self._refusal
                for group in groups.values():
                    self._install_group(group, module)
            except HookError:
                call_again_on_import(module, self._module_imported)
                raise

    def _install_group(self, group: list[HookStatus], module: ModuleType) -> None:
        for status in group:
            try:
                self._wrap(status, module)
            except Exception as error:
                self._fail(group, status, error)
                return

    def _wrap(self, status: HookStatus, module: ModuleType) -> None:
        hook = status.hook
        try:
            parent, name, target = wrapt.resolve_path(module, hook.attribute)
        except wrapt.PathResolutionError as error:
            raise HookError(f"{hook.module} has no {hook.attribute}") from error
        if self._verify is not None:
            self._verify(hook, target)
        wrapper = hook.wrapper
        place = _Installed(parent, name)

        def counted(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not place.live:
                return wrapped(*args, **kwargs)
            status.calls += 1
            return wrapper(wrapped, instance, args, kwargs)

        place.handle = wrapt.wrap_object(parent, name, _Wrapper, (counted, hook, parent))
        self._installed[hook.name] = place
        status.state, status.detail = State.INSTALLED, ""

    def _unwrap(self, status: HookStatus) -> None:
        place = self._installed.pop(status.hook.name)
        place.live = False
        with contextlib.suppress(wrapt.WrapperNotOutermostError):
            wrapt.unwrap_object(place.parent, place.name, place.handle, missing_ok=True)

    def _fail(self, group: list[HookStatus], failed: HookStatus, error: Exception) -> None:
        for status in reversed(group):
            if status.state is State.INSTALLED:
                self._unwrap(status)
            status.state = State.FAILED
            status.detail = f"{error}" if status is failed else f"taken back: {failed.hook.name} failed"
        if self._strict or any(member.hook.required for member in group):
            self._refuse(failed.hook, error)
        logger.warning("hook %s cannot be put on %s and is left out: %s", failed.hook.name, failed.hook.target, error)

    def _refuse(self, hook: Hook, error: Exception) -> None:
        self._refusal = HookError(
            f"hook {hook.name!r} cannot be put on {hook.target}: {error}.\n"
            f"Without it: {hook.why}\n"
            f"Nothing was left installed. VERL_FL_DISABLE={hook.name} goes on without it."
        )
        self._take_off()
        raise self._refusal from error
