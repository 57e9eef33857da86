"""The tab that completes text."""

from collections.abc import Iterator

import gradio as gr

from t2i.play.tabs.parts import ONE_AT_A_TIME, Play, cancel_button, said_on_page
from t2i.play.texts import MOST_TOKENS, complete_both

TAB = "text"


def text_tab(play: Play) -> None:
    """Lay out the tab."""
    painter, origin = play.painters[0], play.origin
    has_template = bool(painter.opened.text_tokenizer.tokenizer.chat_template)

    def complete(
        text: str, tokens: int, is_chat: bool, request: gr.Request
    ) -> Iterator[tuple[str, str, str]]:
        with said_on_page():
            given_up = play.visitors.begin(str(request.session_hash), tab=TAB)
            yield "", "", "Begins."
            found = complete_both(
                painter.opened,
                origin,
                text,
                max_new_tokens=int(tokens),
                is_chat=is_chat,
                busy=painter.busy,
                given_up=given_up,
            )
            for answers in found:
                yield (
                    answers.own,
                    answers.origin,
                    "Done." if answers.origin else f"{painter.name} has answered.",
                )

    gr.Markdown("The likeliest completion among text tokens: image codes are masked, as in `t2i forgetting`.")
    prompt = gr.Textbox(
        label="Prompt",
        lines=4,
        value="Simply put, the theory of relativity states that",
        elem_classes="prompt",
    )
    with gr.Row():
        tokens = gr.Slider(1, MOST_TOKENS, value=40, step=1, label="Tokens at most")
        is_chat = gr.Checkbox(
            has_template, label="Ask by the chat template", visible=has_template, elem_classes="chat"
        )
    with gr.Row() as buttons:
        button = gr.Button("Complete", variant="primary", elem_classes="complete")
    with gr.Row():
        own = gr.Textbox(label=painter.name, lines=6, interactive=False, elem_classes="own")
        before = gr.Textbox(
            origin.why_not,
            label=f"{origin.name}, before training" if origin.name else "Before training",
            lines=6,
            interactive=False,
            elem_classes="origin",
        )
    status = gr.Textbox(label="Status", interactive=False, elem_classes="status")
    begun = button.click(
        complete, [prompt, tokens, is_chat], [own, before, status], show_progress="hidden", **ONE_AT_A_TIME
    )
    with buttons:
        cancel_button(play, tab=TAB, begun=[begun], status=status)
