package ca

import "time"

// The rules of renewal, pure. random is uniform in [0, 1).

const (
	firstRetry = time.Second
	lastRetry  = 150 * time.Second
	soonest    = time.Second // no renewal is planned nearer than this, whatever the certificate says
)

// renewAt says when a certificate received at now is to be renewed: at half of its life as ztunnel does, up to a
// tenth of the wait earlier (so that the identities of a node, and the nodes of a cluster, spread out), and in no
// case before a third of what is left: notBefore may be backdated by more than the life asked for. (So it is, too,
// where half of its life is its end: a life of a nanosecond that begins in the future.) A certificate that ends
// before that is the caller's to refuse.
func renewAt(now, notBefore, notAfter time.Time, random float64) time.Time {
	at := notBefore.Add(notAfter.Sub(notBefore) / 2)
	if third := now.Add(notAfter.Sub(now) / 3); at.Before(third) || !at.Before(notAfter) {
		at = third
	}
	wait := at.Sub(now)
	wait -= time.Duration(random * 0.1 * float64(wait))
	return now.Add(max(wait, soonest)).Round(0) // a wall time: see doc.go
}

// retryAfter is the pause after the n-th failure in a row (from 1): 1 s, doubling, 150 s at most, each +-20 %.
func retryAfter(n int, random float64) time.Duration {
	d := lastRetry
	if n <= 8 { // 2^7 s = 128 s is the last one below the cap
		d = min(firstRetry<<(max(n, 1)-1), lastRetry)
	}
	return time.Duration(float64(d) * (0.8 + 0.4*random))
}

// retryValid shortens a pause while the old certificate is valid for left more: never more than a third of that, so
// that a short outage does not outlast a short life by the pause that follows it (ztunnel waits for the end,
// spec/dataplane.md 8.3), and once more when the old one ends, so that the state is known then; plus a moment, for it
// is valid until the end of that very second.
func retryValid(delay, left time.Duration) time.Duration {
	return min(delay, max(left/3, soonest), left+time.Millisecond)
}
