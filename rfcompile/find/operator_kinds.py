"""Lists of operator names by what the operators do to values; ``statistics.py`` reads them."""

from __future__ import annotations

from rfcompile.find.dataflow import words

REDUCING = words(
    "sum nansum mean nanmean prod amax amin aminmax max min var std var_mean std_mean logsumexp "
    "norm linalg_vector_norm vector_norm any all count_nonzero median nanmedian mode kthvalue topk"
)
ADDING = words("sum nansum mean nanmean")
MOMENTS = words("var std var_mean std_mean norm linalg_vector_norm vector_norm")
VALUE_AND_POSITION = words("max min median nanmedian mode kthvalue topk sort cummax cummin")
VALUE_AND_MASK = words("native_dropout")
COUNTING = words(
    "argmax argmin argsort nonzero searchsorted bucketize histc bincount one_hot arange iota "
    "randint randperm"
)
CONSTANTS = words(
    "full full_like zeros zeros_like ones ones_like empty empty_like empty_strided empty_permuted "
    "new_full new_zeros new_ones new_empty new_empty_strided scalar_tensor eye linspace"
)
LOSSES = words("nll_loss_forward nll_loss2d_forward")
PROBABILITIES = words("exp exp2 sigmoid softmax _softmax _safe_softmax")
SCANNING = words("cumsum cumprod logcumsumexp cummax cummin")
SCALING = words("softmax _softmax _safe_softmax log_softmax _log_softmax")
NORMS_OF_ROWS = words("layer_norm native_layer_norm rms_norm _fused_rms_norm renorm")
REPEATING = words("expand expand_as broadcast_to broadcast_in_dim repeat tile repeat_interleave")
SPREADING = words("nll_loss_backward nll_loss2d_backward diagonal_backward")
SELECTING = words("gather take_along_dim index _unsafe_index index_select take")
SIDE_BY_SIDE = words("cat concat stack slice_scatter select_scatter")
