"""How long a run's prompts and answers are: the numbers that are left of them where nobody holds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from spin_ray.records import Prompt


@dataclass
class Lengths:
    """Of any number of prompts, in tokens."""

    num_prompts: int = 0
    longest_prompt: int = 0
    longest_dialogue: int = 0
    """A prompt with its real answer."""
    real_tokens: int = 0
    """Of all real answers together."""

    @classmethod
    def of(cls, prompts: Iterable[Prompt]) -> Lengths:
        found = cls()
        for prompt in prompts:
            found.add(prompt)
        return found

    def add(self, prompt: Prompt) -> None:
        asked, answered = len(prompt.prompt_ids), len(prompt.real_ids)
        self.num_prompts += 1
        self.longest_prompt = max(self.longest_prompt, asked)
        self.longest_dialogue = max(self.longest_dialogue, asked + answered)
        self.real_tokens += answered

    def of_all(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        """Hand prompts on, and add each."""
        for prompt in prompts:
            self.add(prompt)
            yield prompt

    def and_of(self, others: Iterable[Prompt]) -> Lengths:
        """With those of other prompts."""
        both = Lengths(**asdict(self))
        for prompt in others:
            both.add(prompt)
        return both

    @property
    def tokens_per_answer(self) -> float:
        return self.real_tokens / self.num_prompts
