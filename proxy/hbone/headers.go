package hbone

import (
	"encoding/hex"
	"math/rand/v2"
	"net/netip"
	"strings"
)

// Baggage is what a CONNECT or its answer says about a workload (spec 2.7).
type Baggage struct {
	Cluster, Namespace string
	// WorkloadType is deployment, cronjob, pod or job.
	WorkloadType, Workload string
	Canonical, Revision    string
	Region, Zone           string
}

// Format is the header's value: non-empty fields in ztunnel's order, without spaces or escapes; possibly empty.
func (b Baggage) Format() string {
	var sb strings.Builder
	add := func(key, value string) {
		if value == "" {
			return
		}
		if sb.Len() > 0 {
			sb.WriteByte(',')
		}
		sb.WriteString(key)
		sb.WriteByte('=')
		sb.WriteString(value)
	}
	add("k8s.cluster.name", b.Cluster)
	add("k8s.namespace.name", b.Namespace)
	add("k8s."+b.WorkloadType+".name", b.Workload)
	add("service.name", b.Canonical)
	add("service.version", b.Revision)
	add("cloud.region", b.Region)
	add("cloud.availability_zone", b.Zone)
	return sb.String()
}

// ParseBaggage reads all lines of the header (spec 4.3-8): items split on "," and at "=", the second part is the
// value and further parts are dropped, nothing is trimmed or decoded, an empty value is an absent one, later items
// win. A line with anything but visible ASCII, blanks and tabs makes the whole baggage empty.
func ParseBaggage(lines []string) Baggage {
	var b Baggage
	for _, line := range lines {
		if !visibleASCII(line) {
			return Baggage{}
		}
		for item := range strings.SplitSeq(line, ",") {
			key, value, ok := strings.Cut(item, "=")
			if !ok {
				continue
			}
			value, _, _ = strings.Cut(value, "=")
			switch key {
			case "k8s.cluster.name":
				b.Cluster = value
			case "k8s.namespace.name":
				b.Namespace = value
			case "k8s.deployment.name", "k8s.cronjob.name", "k8s.pod.name", "k8s.job.name":
				b.WorkloadType, b.Workload = strings.TrimSuffix(strings.TrimPrefix(key, "k8s."), ".name"), value
				if value == "" {
					b.WorkloadType = ""
				}
			case "service.name":
				b.Canonical = value
			case "service.version":
				b.Revision = value
			case "cloud.region":
				b.Region = value
			case "cloud.availability_zone":
				b.Zone = value
			}
		}
	}
	return b
}

func visibleASCII(s string) bool {
	for i := 0; i < len(s); i++ {
		if c := s[i]; (c < ' ' || c > '~') && c != '\t' {
			return false
		}
	}
	return true
}

// FormatForwarded is the value of the forwarded header: for="ip:port", and ;host=... if host is not empty.
func FormatForwarded(src netip.AddrPort, host string) string {
	v := `for="` + src.String() + `"`
	if host != "" {
		v += ";host=" + host
	}
	return v
}

// ParseForwardedHost is the host= of a forwarded header, or "" (spec 4.3-9): parts are split on ";" only and
// trimmed, the first that starts with "host=" counts, one quote is taken off at each side. Non-ASCII: "".
func ParseForwardedHost(v string) string {
	if !visibleASCII(v) {
		return ""
	}
	for part := range strings.SplitSeq(v, ";") {
		if host, ok := strings.CutPrefix(strings.TrimSpace(part), "host="); ok {
			host = strings.TrimPrefix(host, `"`)
			return strings.TrimSuffix(host, `"`)
		}
	}
	return ""
}

// Traceparent is a W3C trace context, of which ztunnel uses the two ids and for logs only.
type Traceparent struct {
	Trace  [16]byte
	Parent [8]byte
	Flags  byte
}

// NewTraceparent is a header value with random ids and flags 00: 00-<32 hex>-<16 hex>-00.
func NewTraceparent() string {
	var t Traceparent
	fill(t.Trace[:])
	fill(t.Parent[:])
	return t.String()
}

// fill makes b random and not all zeros (which the standard calls invalid). Ids in logs need no secrecy.
func fill(b []byte) {
	for i := 0; i < len(b); i += 8 {
		v := rand.Uint64() | 1<<63
		for j := range 8 {
			b[i+j] = byte(v >> (56 - 8*j))
		}
	}
}

// String is the header's value.
func (t Traceparent) String() string {
	var b [55]byte
	copy(b[:], "00-")
	hex.Encode(b[3:35], t.Trace[:])
	b[35] = '-'
	hex.Encode(b[36:52], t.Parent[:])
	b[52] = '-'
	hex.Encode(b[53:55], []byte{t.Flags})
	return string(b[:])
}

// ParseTraceparent reads a header of exactly the form that String gives, with any two hex digits as version.
// Anything else is not ok: the caller makes up an id.
func ParseTraceparent(v string) (t Traceparent, ok bool) {
	if len(v) != 55 || v[2] != '-' || v[35] != '-' || v[52] != '-' {
		return Traceparent{}, false
	}
	var version, flags [1]byte
	for _, part := range []struct {
		dst []byte
		src string
	}{{version[:], v[:2]}, {t.Trace[:], v[3:35]}, {t.Parent[:], v[36:52]}, {flags[:], v[53:]}} {
		if _, err := hex.Decode(part.dst, []byte(part.src)); err != nil {
			return Traceparent{}, false
		}
	}
	t.Flags = flags[0]
	return t, true
}
