"""A server of images: OpenAI's route for them, requests that wait drawn in batches of one shape."""
