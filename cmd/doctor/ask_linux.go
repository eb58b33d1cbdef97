package doctor

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"ztun/tun/netns"
)

// expiry reads when a JSON Web Token ends (RFC 7519, section 4.1.4); zero if it is none, or does not say.
func expiry(token string) time.Time {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return time.Time{}
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return time.Time{}
	}
	var claims struct {
		Exp float64 `json:"exp"`
	}
	if json.Unmarshal(b, &claims) != nil || claims.Exp <= 0 || claims.Exp > 1<<40 {
		return time.Time{}
	}
	return time.Unix(int64(claims.Exp), 0)
}

// queryTries: a packet may be lost.
const queryTries = 2

// query asks for a name from within a namespace. Any answer will do, also that there is no such name.
func query(ctx context.Context, ns *netns.NS, server netip.AddrPort) error {
	name, err := dnsmessage.NewName("ztun-doctor.invalid.") // RFC 6761: nobody has it
	if err != nil {
		return err
	}
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: uint16(time.Now().UnixNano()), RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	packet, err := m.Pack()
	if err != nil {
		return err
	}
	var c net.Conn
	if err := ns.Do(func() error { // a socket belongs to the namespace in which it was made
		var err error
		c, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(server))
		return err
	}); err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	buf := make([]byte, 512)
	for range queryTries {
		if _, err = c.Write(packet); err != nil {
			return err
		}
		if err = c.SetReadDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		if _, err = c.Read(buf); err == nil {
			return nil
		}
	}
	return err
}
