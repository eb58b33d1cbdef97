package hbone

import "strings"

// reasonHeader carries why a CONNECT was refused, between ztuns: others neither send nor read it. Without it the
// reason is in the log of the other node only.
const reasonHeader = "x-ztun-reason"

// MaxReason bounds a reason, in bytes, as it is sent and as it is believed.
const MaxReason = 256

// CleanReason is a reason fit for a header, a log line and a terminal, whoever wrote it: printable ASCII, one blank
// between words, and not long. What is cut off is marked.
func CleanReason(s string) string {
	const cut = "..."
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == ' ' || c == '\t' || c == '\r' || c == '\n':
			if n := b.Len(); n == 0 || b.String()[n-1] == ' ' {
				continue
			}
			c = ' '
		case c < ' ' || c > '~':
			c = '?'
		}
		if b.Len() == MaxReason {
			return strings.TrimRight(b.String()[:MaxReason-len(cut)], " ") + cut
		}
		b.WriteByte(c)
	}
	return strings.TrimRight(b.String(), " ")
}
