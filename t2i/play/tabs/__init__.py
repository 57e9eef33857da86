"""The tabs of the page, laid out with Gradio."""
