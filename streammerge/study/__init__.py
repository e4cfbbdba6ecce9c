"""Looking at models by running them. The only room that knows transformers."""
