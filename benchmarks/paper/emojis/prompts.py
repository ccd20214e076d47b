"""The prompts of the embedded emoji pipeline: "fluent cat on blue". The style may be left out."""

from __future__ import annotations

from typing import TypeVar

import torch

# A word of the prompt -> the name of its emoji in Unicode, as Iconify writes it.
OBJECTS = {
    "apple": "red-apple", "banana": "banana", "strawberry": "strawberry", "pineapple": "pineapple",
    "mushroom": "mushroom", "cactus": "cactus", "sunflower": "sunflower", "tulip": "tulip", "tree": "evergreen-tree",
    "cat": "cat-face", "panda": "panda", "frog": "frog", "pig": "pig-face", "fox": "fox", "penguin": "penguin",
    "ladybird": "lady-beetle", "butterfly": "butterfly", "rocket": "rocket", "crown": "crown", "heart": "red-heart",
    "hamburger": "hamburger", "doughnut": "doughnut", "pumpkin": "jack-o-lantern", "house": "house",
}  # fmt: skip
STYLES = ("noto", "blob", "fluent", "twemoji")  # the artists' sets
COLOURS = {
    "white": (255, 255, 255), "grey": (196, 200, 204), "blue": (150, 200, 250),
    "green": (170, 225, 170), "yellow": (250, 230, 150), "pink": (250, 190, 210),
}  # fmt: skip
WORDS = ("", *STYLES, *OBJECTS, "on", *COLOURS)  # a word's id is its place; "" fills prompts up to LENGTH
LENGTH = 4  # words of a prompt
_IDS = {word: place for place, word in enumerate(WORDS)}


THINGS = tuple(OBJECTS)


Number = TypeVar("Number", int, torch.Tensor)


def kinds_of(number: Number) -> tuple[Number, Number, Number]:
    """Thing, style and colour of image `number`, as places in THINGS, STYLES and COLOURS: all in turn."""
    thing, turn = number % len(THINGS), number // len(THINGS)
    return thing, turn % len(STYLES), (turn + thing) % len(COLOURS)


def numbered(number: int) -> str:
    """The prompt of image `number`."""
    thing, style, colour = kinds_of(number)
    return prompt_of(THINGS[thing], list(COLOURS)[colour], STYLES[style])


def prompt_of(thing: str, colour: str, style: str = "") -> str:
    return f"{style} {thing} on {colour}".strip()


def ids_of(prompts: list[str]) -> torch.Tensor:
    """The words' ids of every prompt, (B, LENGTH) int64. The prompt "" is no condition.

    Raises:
        ValueError: a prompt has an unknown word, or more than LENGTH words.
    """
    rows = []
    for prompt in prompts:
        words = prompt.split()
        unknown = [word for word in words if word not in _IDS]
        if unknown or len(words) > LENGTH:
            raise ValueError(
                f"prompt must have at most {LENGTH} words, each one of {', '.join(WORDS[1:])}; got {prompt!r}"
            )
        rows.append([_IDS[word] for word in words] + [0] * (LENGTH - len(words)))
    return torch.tensor(rows).reshape(len(prompts), LENGTH)
