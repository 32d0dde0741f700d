"""How a stacked kernel comes to be, and the kernel of a task layer."""
