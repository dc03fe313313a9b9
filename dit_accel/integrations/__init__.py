"""Other hosts than diffusers: thin, over the same engine, with no logic of their own."""
