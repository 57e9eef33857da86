"""Preparation, done once per dataset: read, crop and encode images, merge them into shards, preview them."""
