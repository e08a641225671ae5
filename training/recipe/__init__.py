"""The recipe: what decides what an adapter becomes, where each value comes from, and what is known of it."""
