"""A page to play with a model: what each tab does, and `tabs/`, where Gradio lays it out."""
