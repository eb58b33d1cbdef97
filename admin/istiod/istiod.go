package istiod

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"

	"ztun/proxy/identity"
)

const (
	connectTimeout   = 5 * time.Second  // TCP
	handshakeTimeout = 10 * time.Second // TCP and TLS and HTTP/2's preface
	maxBackoff       = 15 * time.Second // between a channel's own attempts to connect
)

// Options say which control plane, and how it is to be spoken to.
type Options struct {
	Address     string      // URI; without a scheme https:// ; without a port 443. http:// is an error
	Roots       Roots       // what proves the server
	AltHostname string      // accepted in the server's certificate beside the address's host; "": none
	Token       Token       // what proves us
	ClusterID   string      // sent with the token
	Headers     [][2]string // sent with every call; keys are lower-cased; of equal keys the last counts

	ClientCert, ClientKey string // PEM files, re-read at each Dial: mutual TLS, for `ztun control`; both or none

	TLS12, PQC bool // TLS12_ENABLED; COMPLIANCE_POLICY=pqc
	MaxRecv    int  // largest message accepted, in bytes; 0: 4 MiB
	Logger     *slog.Logger
}

// Connector makes channels to one control plane. Safe for concurrent use.
type Connector struct {
	o          Options
	host, port string
	headers    metadata.MD
	log        *slog.Logger
	open       openConns
}

// New checks the options. Files are not needed yet, but what is wrong with them now is logged as a warning. Errors name
// what is wrong; none holds a token.
func New(o Options) (*Connector, error) {
	host, port, err := parseAddress(o.Address)
	if err != nil {
		return nil, err
	}
	c := &Connector{o: o, host: host, port: port, log: o.Logger}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	if c.headers, err = parseHeaders(o.Headers); err != nil {
		return nil, err
	}
	if err := o.Roots.check(); err != nil {
		return nil, err
	}
	if err := o.Token.check(); err != nil {
		return nil, err
	}
	if at := badByte(o.ClusterID); at >= 0 {
		return nil, fmt.Errorf("cluster id %q: byte %#02x cannot be in a header", o.ClusterID, o.ClusterID[at])
	}
	if (o.ClientCert == "") != (o.ClientKey == "") {
		return nil, errors.New("client certificate and client key: one is given without the other")
	}
	if o.MaxRecv < 0 {
		return nil, fmt.Errorf("largest message %d bytes: cannot be negative", o.MaxRecv)
	}
	if _, from, err := o.Roots.load(); err != nil {
		c.log.Warn("control plane cannot be trusted yet", "address", c.Address(), "error", err.Error())
	} else if from == noRoots || from == emptyText {
		c.log.Warn("control plane cannot be trusted by "+from, "address", c.Address())
	}
	if _, err := c.clientCertificate(); err != nil {
		c.log.Warn("control plane cannot be shown a client certificate yet", "address", c.Address(), "error", err.Error())
	}
	return c, nil
}

// parseAddress splits an address into host (an IPv6 literal without brackets) and port.
func parseAddress(address string) (host, port string, err error) {
	if address == "" {
		return "", "", errors.New("control plane address is empty")
	}
	full := address
	if !strings.Contains(full, "://") {
		full = "https://" + full
	}
	u, err := url.Parse(full)
	var reason string
	switch {
	case err != nil:
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err // without the text again
		}
		reason = err.Error()
	case u.Scheme == "http":
		reason = "tokens and keys' certificates go over TLS only: use https://, or leave the scheme out"
	case u.Scheme != "https":
		reason = "unknown scheme " + u.Scheme + ": use https://, or leave the scheme out"
	case u.Hostname() == "":
		reason = "there is no host in it"
	case u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Path != "" && u.Path != "/":
		reason = "it must be host and port alone, such as istiod.istio-system.svc:15012"
	default:
		if port = u.Port(); port == "" {
			port = "443"
		}
		if n, err := strconv.ParseUint(port, 10, 16); err == nil && n != 0 {
			return u.Hostname(), port, nil
		}
		reason = "port " + port + " is not one of 1 to 65535"
	}
	return "", "", fmt.Errorf("control plane address %q: %s", address, reason)
}

// Address is host:port as dialled.
func (c *Connector) Address() string { return net.JoinHostPort(c.host, c.port) }

// Files are the paths that Dial reads: channels made before one of them changed are out of date.
func (c *Connector) Files() []string {
	var files []string
	for _, f := range []string{c.o.Roots.File, c.o.ClientCert, c.o.ClientKey} {
		if f != "" {
			files = append(files, f)
		}
	}
	return files
}

// Dial reads the roots and the client certificate now and makes a channel that connects at its first call; the caller
// closes it. Errors: a file that cannot be used, by name and cause. What goes wrong with the connection is the error
// of the calls (status Unavailable).
func (c *Connector) Dial() (*grpc.ClientConn, error) {
	cfg, err := c.tls()
	if err != nil {
		return nil, fmt.Errorf("control plane %s: %w", c.Address(), err)
	}
	maxRecv := c.o.MaxRecv
	if maxRecv == 0 {
		maxRecv = 4 << 20
	}
	retry := backoff.DefaultConfig
	retry.MaxDelay = maxBackoff
	// passthrough: names are resolved by the dialer, at each connection.
	return grpc.NewClient("passthrough:///"+c.Address(),
		grpc.WithTransportCredentials(credentials.NewTLS(cfg)),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			conn, err := dial(ctx, address)
			if err == nil {
				c.open.add(conn)
			}
			return conn, err
		}),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableHealthCheck(),
		grpc.WithDisableRetry(),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: retry, MinConnectTimeout: handshakeTimeout}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxRecv)),
		grpc.WithUserAgent("ztun"),
	)
}

// Probe connects once and looks at what the server shows: whether the control plane can be reached and trusted. It does
// not show our token. Errors are those of Dial and of the connection.
func (c *Connector) Probe(ctx context.Context) error {
	cfg, err := c.tls()
	if err != nil {
		return fmt.Errorf("control plane %s: %w", c.Address(), err)
	}
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	raw, err := dial(ctx, c.Address())
	if err != nil {
		return fmt.Errorf("control plane %s: %w", c.Address(), err)
	}
	defer raw.Close()
	cfg.NextProtos = []string{"h2"}
	conn := tls.Client(raw, cfg)
	if err := conn.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("control plane %s: %w", c.Address(), err)
	}
	return conn.Close()
}

// dial opens the TCP connection. A failure to resolve the name says whom to suspect.
func dial(ctx context.Context, address string) (net.Conn, error) {
	d := net.Dialer{
		Timeout:         connectTimeout,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 300 * time.Second, Interval: 75 * time.Second, Count: 9},
	}
	conn, err := d.DialContext(ctx, "tcp", address)
	var dns *net.DNSError
	if errors.As(err, &dns) {
		if dns.IsNotFound {
			return nil, fmt.Errorf("%w (hint: is the name right, and does this host's DNS server know it?)", err)
		}
		return nil, fmt.Errorf("%w (hint: is the DNS server reachable?)", err)
	}
	return conn, err
}

// tls is the configuration for one channel.
func (c *Connector) tls() (*tls.Config, error) {
	roots, from, err := c.o.Roots.load()
	if err != nil {
		return nil, err
	}
	cert, err := c.clientCertificate()
	if err != nil {
		return nil, err
	}
	cfg := identity.Params{TLS12: c.o.TLS12, PQC: c.o.PQC}.Base()
	// crypto/tls verifies one name only: verify does it all.
	v := &verifier{roots: roots, from: from, host: c.host, alt: c.o.AltHostname}
	cfg.InsecureSkipVerify = true
	cfg.VerifyConnection = v.verify
	if cert != nil {
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	return cfg, nil
}

// clientCertificate reads the client's certificate and key; nil if there are none to be read.
func (c *Connector) clientCertificate() (*tls.Certificate, error) {
	if c.o.ClientCert == "" {
		return nil, nil
	}
	certPEM, err := readFile("client certificate", c.o.ClientCert, maxRoots)
	if err != nil {
		return nil, err
	}
	keyPEM, err := readFile("client key", c.o.ClientKey, maxRoots)
	if err != nil {
		return nil, err
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("client certificate %s with key %s: %w", c.o.ClientCert, c.o.ClientKey, err)
	}
	return &cert, nil
}
