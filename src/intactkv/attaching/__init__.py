"""How an intact KV gets into a model: the handle, the plan of a call, substitution, and a cache filled beforehand."""
