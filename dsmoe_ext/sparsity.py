"""One forward of a model: its padding, the sparsity terms of its layers, and their way into the
loss, without touching any model's own forward.

Hooks on the model open a ForwardPass. Every sparse FFN leaves its per-token terms there and puts an
identity node behind its output. The model's loss function closes the pass: it knows the labels,
adds the value to the loss, and ties both together. The tie's backward, the first node of the
backward to run, tells the pass with which factor the loss counts; each layer's node multiplies it
by the mask and hands it to its own terms. So the terms are never outputs of a checkpointed region,
which reentrant checkpointing would lose, and loss scales or accumulation need no thought.
"""

import functools
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dsmoe_ext.models import KEY
from dsmoe_ext.ops import Routing

if TYPE_CHECKING:
    from dsmoe_ext.ffn import DSMoEFFN

IGNORE_INDEX = -100

_thread = threading.local()
# The passes whose backward is running, by autograd's number of it: gradient checkpointing computes
# the layers again there, on CUDA in another thread.
_in_backward: dict[int, "ForwardPass"] = {}


def sparsity_terms(routing: Routing, expert_offsets: Tensor, binary: bool) -> Tensor:
    """One layer's sparsity term of every token, [T]; the formulas stand at losses.sparsity_sum."""
    gates, scores = routing
    num_shared = gates.shape[1] - scores.shape[1]
    if binary:
        sizes = expert_offsets.diff()[num_shared:].to(scores)
        return (scores * (sizes / sizes.sum())).sum(1)  # no matmul: autocast leaves it alone
    return torch.where(gates[:, num_shared:] != 0, scores, 0.0).mean(1)


class ForwardPass:
    """What one forward of a model has seen so far."""

    def __init__(self, owner: nn.Module | None = None, config: Any = None):
        self.owner = owner  # the outermost module that was called; None once that has returned
        self.owner_id = id(owner)
        self.is_training = owner is None or owner.training
        self.config = config  # the one with the key
        self.wants_grad = torch.is_grad_enabled()
        self.is_again = False  # a recomputation: counted already
        self.has_labels = False
        self.token_mask: Tensor | None = None  # [T] bool, False: padding
        self.terms: list[Tensor] = []  # of each layer, [T]
        self.draws: dict[int, Tensor] = {}  # of each layer, for ste="sampled"
        self.is_recomputed = False  # its layers ran without gradients: reentrant checkpointing
        self.factor: Tensor | None = None  # d(final loss) / d(sum of the masked terms)
        self.loss_mask: Tensor | None = None  # [T] bool: the tokens whose terms count
        self.losses: dict[str, Tensor] = {}

    @property
    def weight(self) -> float:
        return (getattr(self.config, KEY, None) or {}).get("sparsity_weight", 1.0)

    def mask_of(self, num_tokens: int) -> Tensor | None:
        """The padding, if it is known of so many tokens."""
        mask = self.token_mask
        return mask if mask is not None and mask.numel() == num_tokens else None

    def draw_of(self, ffn: "DSMoEFFN") -> Tensor:
        """The layer's draw: taken once, and the same one where the layer is computed again."""
        if id(ffn) not in self.draws:
            self.draws[id(ffn)] = ffn.next_draw()
        return self.draws[id(ffn)]

    def note(self, ffn: "DSMoEFFN", y: Tensor, routing: Routing) -> Tensor:
        """Takes down a layer's terms; returns its output y with the node that feeds them."""
        if not (ffn.training or self.has_labels):
            return y
        terms = ffn.loss_terms(routing, self.mask_of(len(routing.gates)))
        if terms is None:
            return y
        compiling = torch.compiler.is_compiling()
        if not self.is_again:
            self.terms.append(terms if compiling else terms.detach())
            self.is_recomputed |= not torch.is_grad_enabled()
        if compiling or not terms.requires_grad:  # the compiler gets the plain sum, without nodes
            return y
        return _Feed.apply(y, terms, self)


def current() -> ForwardPass | None:
    """The pass that the calling layer belongs to; None outside a model."""
    task = _backward_number()
    if task == -1:
        return getattr(_thread, "now", None)
    run = _in_backward.get(task)
    if run is None:  # a backward that does not start at a loss of ours
        run = ForwardPass()
        run.is_again = True
    return run


def _backward_number() -> int:
    """Autograd's number of the backward that is running in this thread, -1 if none is."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


class _Feed(torch.autograd.Function):
    """y [...], terms [T] -> y; the terms' gradient is the pass's factor where its mask is on."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, terms: Tensor, run: "ForwardPass") -> Tensor:
        ctx.run, ctx.num_tokens = run, len(terms)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        run = ctx.run
        if run.factor is None:
            return dy, None, None
        dterms = run.factor.to(dy.device).expand(ctx.num_tokens)
        if run.loss_mask is not None:
            dterms = torch.where(run.loss_mask.to(dy.device), dterms, 0.0)
        return dy, dterms, None


class _Tie(torch.autograd.Function):
    """loss + value; the backward notes with which factor the loss counts.

    value has a gradient of its own where it is of layers that were compiled one by one.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: Tensor, scale: Tensor, run: "ForwardPass") -> Tensor:
        ctx.run = run
        ctx.save_for_backward(scale)
        return loss + value

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        run, task = ctx.run, _backward_number()
        other = _in_backward.get(task)
        if other is not None and other is not run and run.is_recomputed:
            raise RuntimeError(
                "two forwards of one model end in one backward, which reentrant gradient "
                "checkpointing cannot tell apart: use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        run.factor, run.is_again = (dloss * scale).detach(), True
        if other is None:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(functools.partial(_in_backward.pop, task, None))
        _in_backward[task] = run
        return dloss, dloss if ctx.needs_input_grad[1] else None, None, None


def add_sparsity_loss(
    loss: Tensor,
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """loss + sparsity_weight * the sparsity loss of the forward just made in this thread.

    A model's own loss (`model(..., labels=...).loss` in training) holds the term already. Call this
    for a loss that is computed outside of the model: of logits, with label smoothing, DPO.

    Args:
        loss: 0-d.
        labels: [B,L], -100 = none: the terms of tokens that predict a label count. Without labels
            those of all tokens but padding.
        shift_labels: the same, shifted already.
        num_items_in_batch: divides the sum of the terms; None: the number of tokens that count.
    """
    run = getattr(_thread, "now", None) or getattr(_thread, "last", None)
    if run is None or not run.terms:
        return loss
    _thread.last = None
    num_tokens = run.terms[0].numel()
    if shift_labels is None and labels is not None and labels.dim() == 2:
        shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
    mask = run.mask_of(num_tokens)
    is_by_token = shift_labels is not None and shift_labels.numel() == num_tokens
    if shift_labels is not None and is_by_token:
        mask = shift_labels.ne(IGNORE_INDEX).reshape(-1)
    items = num_items_in_batch if is_by_token else None  # of a classifier: sequences, not tokens
    if items is None:
        items = num_tokens if mask is None else mask.sum().clamp(min=1)
    share = 1.0 / (torch.as_tensor(items, device=loss.device) * len(run.terms))
    sums = [
        (terms if mask is None else torch.where(mask.to(terms.device), terms, 0.0)).sum()
        for terms in run.terms
    ]
    value = torch.stack([term.to(loss.device) for term in sums]).sum() * share
    # Nodes of the graph hold this pass. What it keeps has none: a cycle through autograd is never
    # collected, and would keep logits and activations of every step.
    run.losses = {"lm_loss": loss.detach(), "sparsity_loss": value.detach()}
    if not torch.compiler.is_compiling():
        run.terms = [terms.detach() for terms in run.terms]
    if not run.is_training:
        return loss
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not loss.requires_grad:
        return loss + (run.weight * value).to(loss.dtype) if run.weight else loss
    run.loss_mask = mask
    scale = run.weight * share.to(torch.float32)
    return _Tie.apply(loss, (run.weight * value).to(loss.dtype), scale, run)


class LossWithSparsity:
    """A model's loss function, with the sparsity term of the same forward added in training."""

    def __init__(self, original: Callable[..., Tensor]):
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = self.original(*args, **kwargs)
        labels = kwargs.get("labels", args[1] if len(args) > 1 else None)  # Gemma: by position
        return add_sparsity_loss(
            loss,
            labels=labels,
            shift_labels=kwargs.get("shift_labels"),
            num_items_in_batch=kwargs.get("num_items_in_batch"),
        )


# ------------------------------------------------------------------------------------------- hooks


def watch(module: nn.Module, config: Any) -> None:
    """Opens a pass around every forward of module, a model that holds sparse FFNs.

    Of models one inside the other the outermost that is called opens it; the inner ones tell what
    they know of the padding. config is that with the key.
    """
    if not any(_is_ours(hook) for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(functools.partial(_enter, config), with_kwargs=True)
        module.register_forward_hook(_leave, with_kwargs=True, always_call=True)


def unwatch(module: nn.Module) -> None:
    """Undoes watch."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    ours = [key for key, hook in before.items() if _is_ours(hook)]
    ours += [key for key, hook in after.items() if hook is _leave]
    flags = (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs)
    for key in ours:
        for hooks in (before, after, *flags, module._forward_hooks_always_called):
            hooks.pop(key, None)


def _is_ours(hook: Any) -> bool:
    return isinstance(hook, functools.partial) and hook.func is _enter


def _enter(config: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    run = getattr(_thread, "now", None)
    if run is None or run.owner is module:  # the latter: what a forward that failed left behind
        _warn_if_lost(getattr(_thread, "last", None), module)
        run = _thread.now = ForwardPass(module, config)
    run.has_labels |= kwargs.get("labels") is not None
    if run.token_mask is None:
        run.token_mask = _token_mask(args, kwargs)


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    run = getattr(_thread, "now", None)
    if run is None or run.owner is not module:
        return
    run.owner = None  # a pass that a graph or a failed backward keeps must not keep the model
    _thread.now = None
    _thread.last = run if run.terms and not run.losses else None
    if run.losses and getattr(output, "loss", None) is not None:
        for name, value in run.losses.items():
            setattr(output, name, value)  # beside the fields of the model's own output class


def _warn_if_lost(last: ForwardPass | None, module: nn.Module) -> None:
    if torch.compiler.is_compiling() or last is None or last.owner_id != id(module):
        return
    if last.terms and last.weight and last.wants_grad and module.training:
        warnings.warn(
            "a forward in training ended without the model's own loss, so the sparsity loss was "
            "not added: pass labels, or add it with dsmoe_ext.add_sparsity_loss(loss), or set "
            'config.dsmoe["sparsity_weight"] = 0',
            stacklevel=4,
        )


def _token_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Which tokens are none of the padding, [T] bool, from the arguments of a model."""
    tokens = kwargs.get("input_ids", args[0] if args else None)
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if not isinstance(tokens, Tensor) or mask is None:
        return None
    length = tokens.shape[1]
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, -length:].reshape(-1).bool()
    # generate() with a static cache hands over masks [B,1,L,S], or one for each kind of layer. A
    # token sees itself unless it is padding; where there is one token alone, it is none.
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[2] != length or length == 1:
        return None
    cache = kwargs.get("past_key_values", kwargs.get("cache"))
    past = 0 if cache is None else int(cache.get_seq_length())
    own = mask[:, 0].diagonal(past, 1, 2)
    return (own if own.dtype == torch.bool else own == 0).reshape(-1)
