package cli

import "math/rand/v2"

// Words for the names of VMs that were given none: "calm-otter".
var (
	adjectives = []string{
		"able", "bold", "brave", "brisk", "bright", "calm", "clear", "clever", "cosy", "crisp", "deft", "eager",
		"early", "fair", "fond", "fresh", "gentle", "glad", "golden", "grand", "green", "happy", "hardy", "jolly",
		"keen", "kind", "late", "light", "lively", "lucky", "merry", "mild", "neat", "noble", "patient", "plain",
		"plucky", "polite", "proud", "quick", "quiet", "rapid", "ready", "rosy", "sharp", "shiny", "silent", "smart",
		"snug", "spry", "steady", "still", "sunny", "swift", "tidy", "tiny", "warm", "wise", "witty", "young",
	}
	animals = []string{
		"badger", "bat", "bear", "beaver", "bee", "bison", "camel", "carp", "cat", "crane", "crow", "deer",
		"dove", "duck", "eagle", "eel", "elk", "falcon", "finch", "fox", "frog", "goat", "goose", "hare",
		"hawk", "heron", "horse", "ibex", "jay", "koala", "lark", "lemur", "lion", "llama", "lynx", "mole",
		"moose", "mouse", "newt", "orca", "otter", "owl", "panda", "pike", "puma", "quail", "rabbit", "raven",
		"robin", "seal", "shrew", "skunk", "sloth", "snail", "stork", "swan", "tapir", "toad", "trout", "wolf",
	}
)

// inventName makes a name up. It may be taken: the caller tries again.
func inventName() string {
	return adjectives[rand.IntN(len(adjectives))] + "-" + animals[rand.IntN(len(animals))]
}

// nameAttempts bounds how often another name is tried.
const nameAttempts = 5
