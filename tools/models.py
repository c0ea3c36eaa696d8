"""Networks and tokenizers from wherever they are, and back to the disk as Hugging Face does. Imports nothing of drpo.py."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from tools.data import call, resolve
from tools.packing import row_states
from tools.running import stop, wait_for_all, world


def load(loader, name, s, **kwargs):
    """loader.from_pretrained from a Hub name, a folder or a .gguf file; a module:function is called with the seed. Code that
    comes with a model is not run, and weights in a pickle are read as tensors or not at all."""
    if function := resolve(name):
        return call(function, seed=s.seed)
    path = Path(name)
    if not path.exists() and (name.startswith(("/", ".")) or name.count("/") > 1 or path.suffix == ".gguf"):
        stop(f"{name}: no such file or folder")
    try:
        if path.suffix != ".gguf":
            return loader.from_pretrained(name, trust_remote_code=False, **kwargs)
        loaded = loader.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False, **kwargs)
        if isinstance(loaded, nn.Module):  # by now its weights are plain, and can be saved as such
            loaded.hf_quantizer = None
            vars(loaded.config).pop("quantization_config", None)
        return loaded
    except Exception as error:  # every way in which a name can be wrong
        stop(f"{name}: cannot be loaded: {error}")


def load_tokenizer(name, s):
    """As `load`, or from a tokenizer.json. The tokenizer has an EOS, or a response could never end."""
    if name.endswith(".json") and Path(name).is_file():
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=name)
        tokenizer.eos_token = "<|endoftext|>" if "<|endoftext|>" in tokenizer.get_vocab() else None
    else:
        tokenizer = load(AutoTokenizer, name, s)
    if getattr(tokenizer, "eos_token_id", None) is None:
        stop(f"--tokenizer {name}: has no end-of-text token")
    return tokenizer


def load_network(name, s, cls=AutoModelForCausalLM, full=False, **kwargs):
    """A network of transformers, in eval mode on the device. Weights that will all be trained (`full`) are float32."""
    dtype = torch.float32 if full else getattr(torch, s.dtype)
    network = load(cls, name, s, dtype=dtype, **kwargs)
    if not isinstance(network, nn.Module):
        stop(f"--model {name}: gives no network")
    network = network.to(s.device, dtype).eval()
    if cls is AutoModelForCausalLM:
        (body, head), some = body_and_head(network), torch.arange(2, device=s.device)[None]
        with torch.no_grad():  # `response_logprobs` makes logits of states itself
            if not torch.allclose(head(body(some).last_hidden_state), network(some).logits, 1e-3, 1e-3, equal_nan=True):
                stop(f"--model {name}: its logits are scaled or capped, and not just a linear map of its last states")
    check_packing(network.base_model, name, s)
    return network


@torch.no_grad()
def check_packing(body, name, s):
    """Stops where a row's states are not what they are in a plain pass over it alone: with another row before it, or when only
    some of them are asked for; or where a token does not see its whole row."""
    ids, tolerance = torch.arange(4, device=s.device), 1e-2 if body.dtype == torch.float32 else 5e-2
    try:
        plain = torch.cat([body(row[None], use_cache=False).last_hidden_state[0] for row in (ids[:2], ids[2:])]).float()
        packed = row_states(body, ids, [2, 2], ids)
        last = row_states(body, ids, [2, 2], ids[3:])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        stop(f"--model {name}: is not built from transformers' layers and attention (see tools/packing.py): {error}")
    if not torch.allclose(torch.cat([packed, last]), torch.cat([plain, plain[3:]]), tolerance, tolerance, equal_nan=True):
        stop(f"--model {name}: the states of a row depend on which row stands before it in a pass (see tools/packing.py)")
    window = getattr(body.config.get_text_config(), "sliding_window", None)
    longest = s.query_length + max(s.response_length, s.preference_length)
    if window and longest > window:
        stop(f"--model {name}: its attention sees {window} tokens only, and a row may have {longest}: shorten --query_length")


def load_reward(folder, s, full=False):
    """-> (backbone, head) of a reward model. On disk it is an AutoModelForSequenceClassification, whose head has no bias of
    its own: the mean score of the references stands in its config, and score = logit - config.reward_bias."""
    model = load_network(folder, s, AutoModelForSequenceClassification, full)
    if not hasattr(model.config, "reward_bias"):
        stop(f"{folder}: is not a reward model (its config has no reward_bias); make one with: python drpo.py rm")
    return model.base_model, scalar_head(model.score.weight, -model.config.reward_bias).requires_grad_(False)


def scalar_head(weight, bias=0.0):
    """nn.Linear(d, 1) in float32 from a weight (1, d) and a bias, a number."""
    head = nn.Linear(weight.shape[1], 1, device=weight.device)
    head.load_state_dict({"weight": weight, "bias": torch.tensor([bias])})
    return head


def save_network(network, tokenizer, folder):
    """In the layout that from_pretrained reads: an adapter under adapter/, and merged into its network."""
    if world()[0] == 0:
        if hasattr(network, "merge_and_unload"):
            network.save_pretrained(folder / "adapter")
            network = network.merge_and_unload()
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    wait_for_all()


def body_and_head(network):
    """-> the transformer without its head, and the linear layer that makes logits of its states; the adapter stays on."""
    network = network.get_base_model() if hasattr(network, "get_base_model") else network
    return network.base_model, network.get_output_embeddings()


def last_logits(head, states):
    """Logits (B, V) of the last of states (B, n, d). As (W h^T)^T: on a CPU and for few rows two to four times as fast as
    h W^T."""
    logits = (head.weight @ states[:, -1].T).T
    return logits if head.bias is None else logits + head.bias
