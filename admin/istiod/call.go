package istiod

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/metadata"
)

// maxToken bounds a token, in bytes: servers refuse headers much smaller than that.
const maxToken = 64 << 10

// Token is what authorizes us. File is re-read for every call; white space at the end does not count. Both empty: calls
// carry neither authorization nor cluster id.
type Token struct{ File, Literal string }

func (t Token) check() error {
	if t.File != "" && t.Literal != "" {
		return errors.New("token: both a file and a literal are given")
	}
	if t.Literal == "" {
		return nil
	}
	_, err := trimToken("token", t.Literal)
	return err
}

// read returns the token; "" if there is none to be sent. Errors name the file and never quote its content.
func (t Token) read() (string, error) {
	if t.File == "" {
		return strings.TrimRight(t.Literal, " \t\r\n"), nil
	}
	text, err := readFile("token", t.File, maxToken+1)
	if err != nil {
		return "", err
	}
	return trimToken("token file "+t.File, string(text))
}

func trimToken(name, text string) (string, error) {
	if len(text) > maxToken {
		return "", fmt.Errorf("%s: larger than %d bytes: is this the right file?", name, maxToken)
	}
	token := strings.TrimRight(text, " \t\r\n")
	if token == "" {
		return "", fmt.Errorf("%s is empty", name)
	}
	if at := badByte(token); at >= 0 {
		return "", fmt.Errorf("%s: byte %#02x at position %d cannot be in a header: it must be one line of printable ASCII",
			name, token[at], at)
	}
	return token, nil
}

// Context gives ctx the metadata of one call: the configured headers, then, with a token, authorization and clusterid.
// The token file is read now. Errors: Token's.
func (c *Connector) Context(ctx context.Context) (context.Context, error) {
	token, err := c.o.Token.read()
	if err != nil {
		return nil, err
	}
	md := c.headers.Copy()
	if token != "" {
		md.Set("authorization", "Bearer "+token)
		md.Set("clusterid", c.o.ClusterID)
	}
	if already, ok := metadata.FromOutgoingContext(ctx); ok {
		md = metadata.Join(already, md)
	}
	return metadata.NewOutgoingContext(ctx, md), nil
}

// parseHeaders checks XDS_HEADER_* and CA_HEADER_*.
func parseHeaders(headers [][2]string) (metadata.MD, error) {
	// HTTP/2 and gRPC have their own use for these, and gRPC drops them without a word.
	taken := []string{"connection", "content-type", "host", "keep-alive", "proxy-connection", "te", "transfer-encoding",
		"upgrade", "user-agent"}
	md := metadata.MD{}
	for _, h := range headers {
		key, value := strings.ToLower(h[0]), h[1]
		switch {
		case key == "":
			return nil, errors.New("header: its name is empty")
		case strings.ContainsFunc(key, func(r rune) bool {
			return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.')
		}):
			//lint:ignore ST1005 the dot is the last of the list
			return nil, fmt.Errorf("header %q: a name consists of letters, digits, -, _ and .", h[0])
		case slices.Contains(taken, key) || strings.HasPrefix(key, "grpc-"):
			return nil, fmt.Errorf("header %q: the name is HTTP's or gRPC's own", h[0])
		case strings.HasSuffix(key, "-bin"):
			return nil, fmt.Errorf("header %q: names that end in -bin are for binary values", h[0])
		}
		if at := badByte(value); at >= 0 {
			return nil, fmt.Errorf("header %q: byte %#02x of its value cannot be in a header", h[0], value[at])
		}
		md.Set(key, value)
	}
	return md, nil
}

// badByte is where the first byte is that cannot be in gRPC metadata (printable ASCII and space can), or -1.
func badByte(s string) int {
	for i := range len(s) {
		if s[i] < 0x20 || s[i] > 0x7e {
			return i
		}
	}
	return -1
}

// Hint is what to add to a message of the control plane's; "" if nothing is known about it.
func Hint(message string) string {
	switch {
	case strings.Contains(message, "(hint: "):
		return ""
	case strings.Contains(message, "authentication failure"):
		return " (hint: check the control plane logs for more information)"
	case strings.Contains(message, "Temporary failure in name resolution"):
		return " (hint: is the DNS server reachable?)"
	}
	return ""
}
