package ports

const (
	Admin = 15000 // /config_dump and its like, loopback (ADMIN_ADDR)
	// ztunnel's listener for what pods open; ztun has none, and no connection may be steered to it
	Outbound         = 15001
	InboundPlaintext = 15006 // ztunnel's listener for inbound plaintext; as above
	HBONE            = 15008 // mutual TLS with HTTP/2 CONNECT, on every pod's address
	XDS              = 15012 // istiod's, and `ztun control`'s
	ControlStatus    = 15014 // `ztun control --admin`, loopback
	Stats            = 15020 // /metrics (STATS_ADDR)
	Readiness        = 15021 // /healthz/ready (ZTUN_READINESS_PORT)
	DNS              = 15053 // the DNS proxy's own address in a pod (ISTIO_META_DNS_PROXY_ADDR)
	SOCKS            = 15080 // SOCKS5 on a pod's loopback
)

// MeshMin and MeshMax are the local ports of the mesh's own calls, from the node's sockets; a pod's stack calls from
// the ports below. Above Linux' default ip_local_port_range, so that no listener of the node gets one by chance; no
// kernel takes a routing rule whose range ends at 65535.
const MeshMin, MeshMax = 61000, 65534
