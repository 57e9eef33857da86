"""Released weights become Hugging Face and diffusers folders."""
