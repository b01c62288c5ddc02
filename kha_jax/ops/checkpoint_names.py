"""Names of the few tensors of a layer that rematerialisation chooses among; a name does nothing
where nothing is rematerialised."""

from jax.ad_checkpoint import checkpoint_name

__all__ = ["ATTENTION", "INNER", "PROJECTED", "ROUTER", "STREAM", "checkpoint_name"]

PROJECTED = "projected"  # queries, keys and values, before mixers, norms and rotary
ATTENTION = "attention"  # the output of the scores, and the log-partition that its gradient needs
STREAM = "stream"  # the residual stream between attention and feed-forward
ROUTER = "router"  # logits, choice and weights of a mixture's router
INNER = "inner"  # gate and up products of the feed-forward or of the experts
