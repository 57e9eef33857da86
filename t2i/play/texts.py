"""Texts that a model completes, beside those of the language model that it came from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Event, Lock

from t2i.config import Dtype
from t2i.errors import CheckpointError, DataError, UserError
from t2i.files import check_keys
from t2i.measure.forgetting import complete
from t2i.play.asked import read_text
from t2i.play.following import check, follow
from t2i.runs.loading import OpenedModel, open_model
from t2i.runs.run_folder import RESOLVED, read_settings

MOST_TOKENS = 200
"""Of a completion."""


class Origin:
    """The language model that a model came from; opened when it is first asked for."""

    def __init__(self, opened: OpenedModel, *, asked: str | None, trust_remote_code: bool = False) -> None:
        """Find out which one it is.

        Args:
            asked: the CKPT that the user named; None for the run's own model.init.
        """
        self.name, self.why_not = (asked, "") if asked else _init_of(opened)
        self._device, self._trust_remote_code = opened.model.device, trust_remote_code
        # Completions of two precisions would differ for that alone.
        self._dtype: Dtype = "bfloat16" if opened.dtype == "bfloat16" else "float32"
        self._opened: OpenedModel | None = None

    def open(self) -> OpenedModel:
        """Open it, once.

        Raises:
            UserError: it is not there.
        """
        if self._opened is None:
            assert self.name, self.why_not
            self._opened = open_model(
                self.name,
                needs_images=False,
                device=self._device,
                dtype=self._dtype,
                trust_remote_code=self._trust_remote_code,
            )
        return self._opened


def _init_of(opened: OpenedModel) -> tuple[str, str]:
    """Return the name of a run's model.init, or an empty one and the reason why there is none."""
    if not (opened.home / RESOLVED).is_file():
        return "", f"{opened.home} does not say what it came from; name it by --reference."
    try:
        settings = read_settings(opened.home)
        check_keys(settings, {"model": {"init": str}}, where=opened.home / RESOLVED)
    except (UserError, DataError) as error:  # the model can be played with all the same
        return "", f"It is not known what this model came from: {error}"
    init = settings["model"]["init"]
    if init == "random":
        return (
            "",
            "This model came from no language model: it was randomly initialised (model.init is random).",
        )
    return init, ""


@dataclass(frozen=True)
class Completions:
    """What the models answered so far."""

    own: str = ""
    origin: str = ""
    """Of the language model before training; why there is none, where there is none."""


def complete_both(
    opened: OpenedModel,
    origin: Origin,
    text: object,
    *,
    max_new_tokens: int,
    is_chat: bool,
    busy: Lock,
    given_up: Event,
) -> Iterator[Completions]:
    """Complete a text by both models, greedily and without image codes; yield after each.

    Raises:
        UserError: the text or the number of tokens is out of range.
    """
    asked = read_text("prompt", text)
    if not 1 <= max_new_tokens <= MOST_TOKENS:
        raise UserError(f"The number of tokens is {max_new_tokens}; expected 1 to {MOST_TOKENS}.")

    def answer(model: OpenedModel) -> str:
        return complete(
            model.model,
            [asked],
            tokenizer=model.text_tokenizer,
            layout=model.layout,
            max_new_tokens=max_new_tokens,
            is_chat=is_chat,
        )[0]

    def work(tell: Callable[[Completions], None]) -> None:
        own = answer(opened)
        tell(Completions(own))
        check(given_up)
        tell(Completions(own, origin.why_not or _origins(origin, answer)))

    return follow(work, busy=busy, given_up=given_up)


def _origins(origin: Origin, answer: Callable[[OpenedModel], str]) -> str:
    try:
        return answer(origin.open())
    except (UserError, DataError, CheckpointError) as error:
        # The model's own answer stands; the other's place says why it is empty.
        return f"{origin.name} cannot be opened: {error}"
