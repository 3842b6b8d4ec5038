"""Where training scripts keep a state dict, and the prefixes that wrappers add."""

from __future__ import annotations

# Where training scripts keep the weights, averaged (EMA) ones first: they are what was evaluated.
STATE_KEYS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *(
        "state_dict",
        "model_state_dict",
        "model_state",
        "model",
        "network",
        "net",
        "weights",
        "params",
    ),
)
WRAPPERS = ("module.", "_orig_mod.")  # put before every name by DataParallel and torch.compile
