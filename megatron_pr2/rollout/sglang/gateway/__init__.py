"""SGLang's own router in front of several servers."""
