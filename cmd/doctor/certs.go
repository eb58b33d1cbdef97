package doctor

import (
	"crypto/x509"
	"fmt"
	"strings"
	"time"
)

// late is the part of its life after which a certificate should long have been renewed (ztunnel and ztun: at the half).
const late = 0.9

func (c Cert) judge(now time.Time, add report) {
	dump := fmt.Sprintf("curl -s http://127.0.0.1:15000/config_dump | jq '.certificates[] | select(.identity == %q)'",
		c.Identity)
	if reason, ok := strings.CutPrefix(c.State, "Unavailable"); ok {
		add(dump, "connections of that identity fail", "%s has no certificate%s", c.Identity, reason)
	}
	if len(c.Chain) == 0 {
		return
	}
	leaf := c.Chain[0]
	life, rest := leaf.NotAfter.Sub(leaf.NotBefore), leaf.NotAfter.Sub(now)
	switch {
	case now.Before(leaf.NotBefore):
		add("timedatectl", "peers are refused, and refuse us: this node's clock is behind the certificate authority's",
			"the certificate of %s is valid only from %s", c.Identity, stamp(leaf.NotBefore))
		return
	case rest <= 0:
		add(dump, "peers refuse it", "the certificate of %s has ended at %s", c.Identity, stamp(leaf.NotAfter))
		return
	case float64(rest) < (1-late)*float64(life):
		add(dump, "it is renewed at half its life: the certificate authority does not answer, or refuses",
			"the certificate of %s ends at %s and has not been renewed", c.Identity, stamp(leaf.NotAfter))
	}
	if domain, ok := trustDomain(c.Identity); ok && c.Domain != "" && domain != c.Domain {
		add("env | grep -i trust_domain", "peers take certificates of their own trust domain only",
			"%s is not of the trust domain %s", c.Identity, c.Domain)
	}
	o := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	for _, r := range c.Roots {
		o.Roots.AddCert(r)
	}
	for _, i := range c.Chain[1:] {
		o.Intermediates.AddCert(i)
	}
	if _, err := leaf.Verify(o); err != nil {
		add(dump, "peers with the same roots refuse it: the authority's key has changed, or the chain lacks an intermediate",
			"the certificate of %s does not lead to the roots: %v", c.Identity, err)
	}
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func trustDomain(identity string) (string, bool) {
	rest, ok := strings.CutPrefix(identity, "spiffe://")
	domain, _, _ := strings.Cut(rest, "/")
	return domain, ok
}
