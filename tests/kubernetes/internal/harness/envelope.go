package harness

import "fmt"

// Recipients is how many KEKs the envelope's DEK is wrapped under, of which each can open it.
func Recipients(envelope []byte) (int, error) {
	const at = 1 + 1 + 16 // behind format, suite and key set
	if len(envelope) <= at || envelope[0] != 1 {
		return 0, fmt.Errorf("no envelope: %x", envelope)
	}
	return int(envelope[at]), nil
}
