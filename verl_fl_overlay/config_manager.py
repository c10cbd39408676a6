"""The API of verl's earlier FlagOS plugins on top of ``Settings``, for code that imports it.

Change ``from verl_plugin_fl.utils.config_manager import ...`` to this module.  The environment is read at every call.
"""

from __future__ import annotations

import logging

from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.table import of_phase

logger = logging.getLogger("verl_fl_overlay")


class FLEnvManager:
    """Questions about the environment; a list that was not set is None."""

    @staticmethod
    def is_training_fl_enabled() -> bool:
        """Return whether TransformerEngine-FL was told to take FlagOS's implementations."""
        settings = Settings.from_environment()
        return "TE_FL_PREFER" in settings.given and settings["TE_FL_PREFER"] == "flagos"

    @staticmethod
    def is_rollout_fl_enabled() -> bool:
        """Return whether vllm-plugin-FL was told to take FlagOS's implementations."""
        settings = Settings.from_environment()
        return "VLLM_FL_PREFER" in settings.given and settings["VLLM_FL_PREFER"] == "flagos"

    @staticmethod
    def is_flaggems_enabled() -> bool:
        """Return whether training uses FlagGems."""
        return Settings.from_environment().flaggems_in_training

    @staticmethod
    def is_flagcx_enabled() -> bool:
        """Return whether training communicates through FlagCX."""
        return bool(Settings.from_environment()["USE_FLAGCX"])

    @classmethod
    def is_fl_enabled(cls) -> bool:
        """Return whether any of the four is on."""
        on = (cls.is_training_fl_enabled, cls.is_rollout_fl_enabled, cls.is_flaggems_enabled, cls.is_flagcx_enabled)
        return any(ask() for ask in on)

    @staticmethod
    def get_training_whitelist() -> list[str] | None:
        """Return the only FlagGems operators that training uses."""
        return list(Settings.from_environment()["TRAINING_FL_FLAGOS_WHITELIST"]) or None

    @staticmethod
    def get_training_blacklist() -> list[str] | None:
        """Return the FlagGems operators that training leaves out."""
        return list(Settings.from_environment()["TRAINING_FL_FLAGOS_BLACKLIST"]) or None

    @staticmethod
    def get_rollout_whitelist() -> list[str] | None:
        """Return the only FlagGems operators that rollout uses."""
        return list(Settings.from_environment()["VLLM_FL_FLAGOS_WHITELIST"]) or None

    @staticmethod
    def get_rollout_blacklist() -> list[str] | None:
        """Return the FlagGems operators that rollout leaves out."""
        return list(Settings.from_environment()["VLLM_FL_FLAGOS_BLACKLIST"]) or None

    @staticmethod
    def get_env_snapshot(phase: str = "all") -> dict[str, str]:
        """Return the variables of ``phase`` (training, rollout or all) that are set, as they were set."""
        given = Settings.from_environment().given
        wanted = of_phase("" if phase == "all" else phase)
        return {variable.name: given[variable.name] for variable in wanted if variable.name in given}

    @staticmethod
    def get_summary() -> str:
        """Return what is asked for, such as ``FL[training(TE_FL=flagos), FlagGems, FlagCX]``, in the plugins' words."""
        settings = Settings.from_environment()
        parts = [
            f"training(TE_FL={settings['TE_FL_PREFER']})" if "TE_FL_PREFER" in settings.given else "",
            f"rollout(VLLM_FL={settings['VLLM_FL_PREFER']})" if "VLLM_FL_PREFER" in settings.given else "",
            "FlagGems" if settings.flaggems_in_training else "",
            "FlagCX" if settings["USE_FLAGCX"] else "",
        ]
        return f"FL[{', '.join(filter(None, parts)) or 'disabled'}]"


def may_enable_flag_gems(phase: str = "training") -> None:
    """Do nothing: the overlay itself routes FlagGems' operators while an engine trains."""
    logger.debug("may_enable_flag_gems(%r) does nothing: verl-fl-overlay routes FlagGems itself", phase)
