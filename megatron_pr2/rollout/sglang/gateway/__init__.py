"""SGLang's own router in front of several servers, and the proof that routes come through it."""
