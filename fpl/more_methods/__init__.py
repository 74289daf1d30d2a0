"""Ten other methods, of 2023 to 2026, and a control: each states what differs from PromptFL.

`prompts` learn prompts in another way; `features` learn on image features, without a text tower's
gradient; `private` have what a step draws at random: dropout, or noise. Shapes and symbols are
those of fpl.methods.
"""

from fpl.methods import PromptFL
from fpl.more_methods import features, private, prompts

MORE: dict[str, type[PromptFL]] = {
    kind.key: kind for kind in (*prompts.ROWS, *features.ROWS, *private.ROWS)
}
