"""From proxies to wide models: searches, what they say about transfer, and the recipe that they leave."""
