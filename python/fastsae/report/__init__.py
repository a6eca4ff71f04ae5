"""Pages to look at: what was learned, what it costs the model, what latents mean."""
