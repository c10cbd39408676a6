"""What is known to be wrong with FlagGems' kernels, by aten key and version: training leaves these operators to torch.

Every row was looked up in FlagGems' source and in the issue that it links.  No issue was closed by a release when the
table was written (September 2026), so no row has an ``until`` yet: when a release mends one, that version goes there.
Not here: kernels that cut a gradient (``safety`` finds these itself).  ``ATTENTION`` was mended (pull request 3607)
before FlagGems put it in the place of an operator of torch, and so is no row; TransformerEngine-FL calls it.
"""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import Version

_GEMS = "https://github.com/flagos-ai/FlagGems/issues/"
_TORCH_FL = "https://github.com/flagos-ai/Torch-FL/issues/"


@dataclass(frozen=True)
class Fault:
    """A wrong kernel: ``what`` goes wrong, ``link`` to who showed it.

    It is wrong from version ``since`` on ("": in every version that has it), and right from ``until`` on ("": in none).
    ``vendor`` is FlagGems' name of the only chip where it is wrong, "" if it is wrong on all.
    """

    key: str
    what: str
    link: str
    since: str = ""
    until: str = ""
    vendor: str = ""

    def holds(self, version: Version | None, vendor: str) -> bool:
        """Tell whether ``version`` for ``vendor`` has the fault; None is a version that is not known: it has all."""
        if self.vendor and self.vendor != vendor:
            return False
        if version is None:
            return True
        release = Version(version.base_version)  # 5.3.0 calls itself 5.3.0rc2
        since, until = (Version(text) if text else None for text in (self.since, self.until))
        return (since is None or release >= since) and (until is None or release < until)

    @property
    def versions(self) -> str:
        """The versions that are wrong, in words."""
        return f"{self.since or 'first'} to {self.until or 'newest'}"

    def __str__(self) -> str:
        return f"{self.what} ({self.link})"


FAULTS = (
    Fault(
        "native_layer_norm",
        "mean and deviation are kept in the input's precision, which torch's own backward does not take for bf16, and "
        "FlagGems' backward must not be used either",
        _GEMS + "5392",
    ),
    Fault(
        "native_layer_norm_backward",
        "the first dimension alone is taken for the rows, so the gradient of an input of three or more dimensions is "
        "wrong, and memory behind the gradients of weight and bias is written",
        _GEMS + "5392",
    ),
    Fault(
        "mse_loss_backward",
        "for the reductions mean and sum it reads behind the one element of the loss's gradient: only the first "
        "element of the gradient is right",
        _GEMS + "5212",
        since="5.3.1",
    ),
    Fault(
        "cudnn_batch_norm_backward",
        "the saved inverse deviation is taken for a variance: the gradients of input and weight are wrong",
        _GEMS + "5222",
        since="5.3.2",
    ),
    Fault(
        "_embedding_bag_dense_backward",
        "mode max gets the gradient of mode mean",
        _GEMS + "5220",
        since="5.3.2",
    ),
    *(
        Fault(
            key,
            "for a label that is ignored it stores a zero at the place that the label names, which may be another "
            "row's gradient, or outside of the tensor for -100",
            _GEMS + "5025",
        )
        for key in ("nll_loss_backward", "nll_loss2d_backward")
    ),
    Fault("_cdist_backward", "every norm gets the gradient of the Euclidean one (p=2)", _GEMS + "5023", since="5.3.1"),
    Fault(
        "unfold_backward",
        "for windows of size 0 it writes outside of the tensor, and the next kernel fails",
        _GEMS + "5389",
    ),
    Fault(
        "fractional_max_pool2d_backward",
        "indices are not checked: it writes outside of the tensor, and the next kernel fails",
        _GEMS + "5389",
        since="5.3.2",
    ),
    Fault(
        "_softmax",
        "a strided input gives a wrong result: the output has the input's strides and is written as if it had none",
        _TORCH_FL + "171",
        since="5.3.0",
    ),
    *(
        Fault(
            key,
            "a strided output of the forward gives a wrong gradient: it is read as if it had no strides",
            _TORCH_FL + "171",
        )
        for key in ("_softmax_backward_data", "_log_softmax_backward_data")
    ),
    Fault(
        "topk",
        "a strided input gives a wrong result: it is read as if it had no strides",
        _TORCH_FL + "173",
    ),
    Fault(
        "bucketize.Tensor",
        "a strided input gives memory that was never written",
        "https://github.com/flagos-ai/FlagGems/pull/4831",
        since="5.3.1",
    ),
    Fault(
        "index.Tensor",
        "with int32 indices an offset of 2**31 elements or more overflows: it reads elsewhere, or fails",
        _GEMS + "4153",
    ),
    *(
        Fault(key, "the generator is dropped, so a run with the same seed draws other numbers", _GEMS + "3284")
        for key in ("normal_", "normal.Tensor_Tensor", "normal.Tensor_float", "normal.float_Tensor")
    ),
    Fault("linear", "the result is wrong on Ascend 910", _GEMS + "5657", since="5.3.1", vendor="ascend"),
    Fault("_softmax", "the result is wrong on Ascend 910", _GEMS + "6109", vendor="ascend"),
)

ATTENTION = Fault(
    "scaled_dot_product_attention_backward",
    "with some tilings a part of the query's gradient is never written",
    _GEMS + "3395",
    until="5.3.1",
)

NEWEST = Version("9999")
"""Stands for the newest version, where none is installed."""


def of_version(version: Version | None) -> list[Fault]:
    """Return the faults of ``version`` on any chip."""
    return [fault for fault in FAULTS if fault.holds(version, fault.vendor)]


def known(key: str, version: Version | None, vendor: str) -> str:
    """Return what is wrong with FlagGems' kernel for the aten ``key`` in ``version`` for ``vendor``, "" if nothing."""
    return next((str(fault) for fault in FAULTS if fault.key == key and fault.holds(version, vendor)), "")
