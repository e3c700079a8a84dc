"""Making images and videos with a pipeline of diffusers whose transformer runs a recipe's attention."""
