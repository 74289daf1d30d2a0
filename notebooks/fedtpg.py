"""FedTPG's prompt generator (Qiu et al., ICLR 2024, arXiv 2310.06123), written for notebook 06.

06_own_method.ipynb says which equation is which line, and what is simplified.
"""

from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F

from fpl.methods import PromptFL, check_template


@dataclass(frozen=True)
class FedTPG(PromptFL):
    """A shared network writes the prompt: learnt queries attend to the features of the class names.

    P = h(CrossAttention(Q, T W_K, T W_V)). T (c, d) are the frozen CLIP's features of the class
    names in `template`, Q (m, w) the queries, h two layers with `hidden` units between them. No
    prompt is learnt and nothing is private. Uploads and downloads m w + 2 d w + 2 w hidden numbers.
    """

    key = "fedtpg_simplified"
    title = "FedTPG (simplified)"
    source = "Qiu et al., ICLR 2024 (arXiv 2310.06123)"
    shared = ("queries", "keys", "values", "inner", "outer")

    hidden: int = 128
    template: str = "{}"

    def check(self, text, clients):
        check_template("template", self.template)

    def init(self, text, gen):
        w, d, hidden = text.width, text.dim, self.hidden
        return {
            "queries": torch.randn(self.n_ctx, w, generator=gen),
            "keys": torch.randn(d, w, generator=gen) / sqrt(d),
            "values": torch.randn(d, w, generator=gen) / sqrt(d),
            "inner": torch.randn(w, hidden, generator=gen) / sqrt(w),
            "outer": 0.02 * torch.randn(hidden, w, generator=gen),  # as small as other prompts
        }

    def context(self, text, down, client_ids, clients):
        names = text.zero_shot(self.template)
        return {"names": names.expand(len(client_ids), -1, -1)}  # T, (n, c, d)

    def encode(self, text, p, context):
        return text(self.prompt(p, context["names"]))

    def prompt(self, p, names):
        """Return the prompts (n, m, w) that the generators p write for these class names."""
        t = F.layer_norm(names, names.shape[-1:])
        q = F.layer_norm(p["queries"], p["queries"].shape[-1:])
        gathered = F.scaled_dot_product_attention(q, t @ p["keys"], t @ p["values"])
        # without the root, m w outputs that share their weights would move too far in a step
        return F.gelu(gathered @ p["inner"]) @ p["outer"] / sqrt(self.hidden)
