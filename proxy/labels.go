package proxy

import (
	"strings"

	"ztun/proxy/hbone"
	"ztun/proxy/identity"
	"ztun/proxy/state"
)

// The common labels of the traffic metrics, in ztunnel's order (spec 10.2).
const (
	lReporter = iota
	lSourceWorkload
	lSourceCanonicalService
	lSourceCanonicalRevision
	lSourceNamespace
	lSourcePrincipal
	lSourceApp
	lSourceVersion
	lSourceCluster
	lDestinationService
	lDestinationServiceNamespace
	lDestinationServiceName
	lDestinationWorkload
	lDestinationCanonicalService
	lDestinationCanonicalRevision
	lDestinationNamespace
	lDestinationPrincipal
	lDestinationApp
	lDestinationVersion
	lDestinationCluster
	lRequestProtocol
	lResponseFlags
	lSecurityPolicy
	lSourceRegion
	lSourceZone
	lDestinationRegion
	lDestinationZone
	nLabels
)

var labelNames = [nLabels]string{
	"reporter",
	"source_workload", "source_canonical_service", "source_canonical_revision", "source_workload_namespace",
	"source_principal", "source_app", "source_version", "source_cluster",
	"destination_service", "destination_service_namespace", "destination_service_name",
	"destination_workload", "destination_canonical_service", "destination_canonical_revision",
	"destination_workload_namespace",
	"destination_principal", "destination_app", "destination_version", "destination_cluster",
	"request_protocol", "response_flags", "connection_security_policy",
	"source_region", "source_zone", "destination_region", "destination_zone",
}

// labels is one set of label values. An empty value is written as "unknown".
type labels [nLabels]string

// maxLabel bounds a label's value in bytes: Kubernetes' names have 253 at most, an identity is two of them and a
// trust domain.
const maxLabel = 1024

// maxClaimed bounds the value of a label that a peer chooses.
const maxClaimed = 253

// clip bounds a text. What is cut off is not said: no name that means anything is that long.
func clip(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	return strings.ToValidUTF8(s, "?")
}

// labelSet is a set of labels by index.
type labelSet uint32

func (s labelSet) has(i int) bool { return s>>i&1 != 0 }

// The labels that baggage fills in.
const (
	sourceClaims labelSet = 1<<lSourceWorkload | 1<<lSourceCanonicalService | 1<<lSourceCanonicalRevision |
		1<<lSourceNamespace |
		1<<lSourceApp | 1<<lSourceVersion | 1<<lSourceCluster | 1<<lSourceRegion | 1<<lSourceZone
	destinationClaims labelSet = 1<<lDestinationWorkload | 1<<lDestinationCanonicalService |
		1<<lDestinationCanonicalRevision |
		1<<lDestinationNamespace | 1<<lDestinationApp | 1<<lDestinationVersion | 1<<lDestinationCluster |
		1<<lDestinationRegion | 1<<lDestinationZone
)

// claims tells whose claims there are among the labels made of in, by identity, and which labels they are. A peer
// without an identity is known by its address only to those who need not be: all such peers are one.
func (in *labelInput) claims() (claimant string, set labelSet) {
	who := func(d *derived) string {
		if d.hasID {
			return d.id.String()
		}
		return "without identity"
	}
	if d := in.derived; d != nil && in.source == nil && d.baggage != (hbone.Baggage{}) {
		claimant, set = who(d), sourceClaims
	}
	if d := in.farEnd; d != nil && d.baggage != (hbone.Baggage{}) {
		claimant, set = who(d), set|destinationClaims
	}
	return claimant, set
}

// Reporters and security policies, as label values.
const (
	reporterSource      = "source"
	reporterDestination = "destination"
	securityMutualTLS   = "mutual_tls"
	securityUnknown     = "unknown"
)

// derived is what the peer itself told us: its certificate, and its baggage.
type derived struct {
	id      identity.ID
	hasID   bool
	baggage hbone.Baggage
}

// labelInput is what the labels of one connection are made from.
type labelInput struct {
	reporter string
	security string
	derived  *derived // of the source; nil for plaintext outbound
	source   *state.Workload
	dest     *state.Workload
	farEnd   *derived // double HBONE: takes the place of dest, which is the gateway
	service  *state.Service
}

// makeLabels applies, later overwriting earlier: derived source, source record, destination record,
// destination service (spec 10.3).
func makeLabels(in labelInput) labels {
	var l labels
	l[lReporter] = in.reporter
	l[lRequestProtocol] = "tcp"
	l[lResponseFlags] = FlagNone.String()
	l[lSecurityPolicy] = in.security
	if d := in.derived; d != nil {
		b := clipped(&d.baggage)
		l[lSourceWorkload] = b.Workload
		l[lSourceCanonicalService] = b.Canonical
		l[lSourceCanonicalRevision] = b.Revision
		l[lSourceVersion] = b.Revision
		l[lSourceNamespace] = b.Namespace
		l[lSourceCluster] = b.Cluster
		l[lSourceRegion] = b.Region
		l[lSourceZone] = b.Zone
		l[lSourceApp] = b.Workload
		if d.hasID {
			l[lSourcePrincipal] = d.id.String()
		}
	}
	if w := in.source; w != nil {
		// The record does not set source_principal: only a certificate proves it.
		l[lSourceWorkload] = w.WorkloadName
		l[lSourceCanonicalService] = w.CanonicalName
		l[lSourceApp] = w.CanonicalName
		l[lSourceCanonicalRevision] = w.CanonicalRevision
		l[lSourceVersion] = w.CanonicalRevision
		l[lSourceNamespace] = w.Namespace
		l[lSourceCluster] = w.ClusterID
		l[lSourceRegion] = w.Locality.Region
		l[lSourceZone] = w.Locality.Zone
	}
	if d := in.farEnd; d != nil {
		l.setFarEnd(d)
	} else if w := in.dest; w != nil {
		l[lDestinationWorkload] = w.WorkloadName
		l[lDestinationCanonicalService] = w.CanonicalName
		l[lDestinationApp] = w.CanonicalName
		l[lDestinationCanonicalRevision] = w.CanonicalRevision
		l[lDestinationVersion] = w.CanonicalRevision
		l[lDestinationNamespace] = w.Namespace
		l[lDestinationCluster] = w.ClusterID
		l[lDestinationPrincipal] = w.Identity().String()
		l[lDestinationRegion] = w.Locality.Region
		l[lDestinationZone] = w.Locality.Zone
	}
	if s := in.service; s != nil {
		l[lDestinationService] = s.Hostname
		l[lDestinationServiceNamespace] = s.Namespace
		l[lDestinationServiceName] = s.Name
	}
	for i := range l {
		if len(l[i]) > maxLabel {
			l[i] = clip(l[i], maxLabel)
		}
	}
	return l
}

// clipped is baggage fit for labels.
func clipped(b *hbone.Baggage) hbone.Baggage {
	c := *b
	for _, s := range []*string{&c.Cluster, &c.Namespace, &c.Workload, &c.Canonical, &c.Revision, &c.Region, &c.Zone} {
		*s = clip(*s, maxClaimed)
	}
	return c
}

// setFarEnd fills in the destination from what it proves and says of itself; what it does not say is unknown.
func (l *labels) setFarEnd(d *derived) {
	b := clipped(&d.baggage)
	l[lDestinationWorkload] = b.Workload
	l[lDestinationCanonicalService] = b.Canonical
	l[lDestinationApp] = b.Workload
	l[lDestinationCanonicalRevision] = b.Revision
	l[lDestinationVersion] = b.Revision
	l[lDestinationNamespace] = b.Namespace
	l[lDestinationCluster] = b.Cluster
	l[lDestinationRegion] = b.Region
	l[lDestinationZone] = b.Zone
	if d.hasID {
		l[lDestinationPrincipal] = d.id.String()
	}
}
