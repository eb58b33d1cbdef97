package fdstore

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Message is a message of sd_notify(3), as far as descriptors and the process's life go.
type Message struct {
	Store, Remove, Barrier, Ready, Stopping bool

	Name string // FDNAME
}

const (
	// MaxMessage is how long a message may be that Parse takes, in bytes.
	MaxMessage = 4096
	// MaxName is how long FDNAME may be, in bytes (systemd's bound).
	MaxName = 255
)

// ErrMessage is what Parse returns (wrapped) for what is no message.
var ErrMessage = errors.New("not a message of sd_notify")

// Parse reads a message. What it does not know is left out, as the protocol has it.
func Parse(b []byte) (m Message, err error) {
	if len(b) > MaxMessage {
		return m, fmt.Errorf("%w: longer than %d bytes", ErrMessage, MaxMessage)
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		key, value, found := strings.Cut(line, "=")
		if !found {
			if line != "" {
				return Message{}, fmt.Errorf("%w: a line without =", ErrMessage)
			}
			continue
		}
		on := value == "1"
		switch key {
		case "FDSTORE":
			m.Store = on
		case "FDSTOREREMOVE":
			m.Remove = on
		case "BARRIER":
			m.Barrier = on
		case "READY":
			m.Ready = on
		case "STOPPING":
			m.Stopping = on
		case "FDNAME":
			if !goodName(value) {
				return Message{}, fmt.Errorf("%w: FDNAME %q", ErrMessage, value[:min(len(value), MaxName)])
			}
			m.Name = value
		}
	}
	switch {
	case m.Store && m.Remove:
		return Message{}, fmt.Errorf("%w: FDSTORE and FDSTOREREMOVE", ErrMessage)
	case (m.Store || m.Remove) && m.Name == "":
		return Message{}, fmt.Errorf("%w: no FDNAME", ErrMessage)
	}
	return m, nil
}

// goodName: systemd's rule, names are joined with colons.
func goodName(s string) bool {
	bad := func(r rune) bool { return r < ' ' || r > '~' || r == ':' }
	return s != "" && len(s) <= MaxName && !strings.ContainsFunc(s, bad)
}

// String is the message as it is sent.
func (m Message) String() string {
	var b strings.Builder
	for _, f := range []struct {
		on   bool
		line string
	}{
		{m.Ready, "READY=1\n"}, {m.Stopping, "STOPPING=1\n"}, {m.Store, "FDSTORE=1\n"}, {m.Remove, "FDSTOREREMOVE=1\n"},
		{m.Name != "", "FDNAME=" + m.Name + "\n"},
		// A socket that hangs up (which a listening one does not) would be let go of; we say ourselves when that is.
		{m.Store, "FDPOLL=0\n"},
		{m.Barrier, "BARRIER=1\n"},
	} {
		if f.on {
			b.WriteString(f.line)
		}
	}
	return b.String()
}

// Name is what a socket is kept as: of a namespace, by device and inode of its file (a socket holds its namespace, so
// that no other can have them meanwhile), for a network ("tcp", "udp") and a local address. Short, since the names of
// all have to fit into one environment variable.
func Name(dev, ino uint64, network string, at netip.AddrPort) string {
	addr := strings.ReplaceAll(at.Addr().WithZone("").String(), ":", "_")
	return fmt.Sprintf("%s.%s.%s%d.%s", strconv.FormatUint(ino, 36), strconv.FormatUint(dev, 36), network[:1], at.Port(), addr)
}
