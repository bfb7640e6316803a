"""`timm-tokens train`: its objectives, each a module with `Options`, `build(options)` and `run(options)`."""
