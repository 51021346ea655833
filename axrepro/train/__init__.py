"""The trainer: one pure step, one loop. It sees a method only through the `Method` interface."""
