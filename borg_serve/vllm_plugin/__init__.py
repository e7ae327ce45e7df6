"""Classes that vLLM loads in the engine's processes of borg-serve, because `engine.arguments` names them."""
