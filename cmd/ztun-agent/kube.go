package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/workqueue"

	"ztun/admin/agent"
)

// cluster is the API server: agent.Cluster.
type cluster struct {
	api, apps        *rest.RESTClient // core/v1, apps/v1
	node             string
	pods, namespaces cache.SharedIndexInformer
	queue            workqueue.TypedRateLimitingInterface[agent.Ref]
	broadcaster      record.EventBroadcaster
	recorder         record.EventRecorder
	changed          chan struct{} // full when something has
	set              ownSet
}

var _ agent.Cluster = &cluster{}

const (
	// callTimeout bounds one call of the API server; watches have none.
	callTimeout = 10 * time.Second
	// The pause after a failure with a pod, which doubles each time.
	firstPause, longestPause = 200 * time.Millisecond, 15 * time.Second
)

// newCluster makes the client and the informers, which do nothing before watch. namespace and set are of the agent's
// own DaemonSet.
func newCluster(config *rest.Config, node, namespace, set string) (*cluster, error) {
	scheme := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(scheme), appsv1.AddToScheme(scheme)); err != nil {
		return nil, err
	}
	config = rest.CopyConfig(config)
	config.APIPath, config.GroupVersion = "/api", &corev1.SchemeGroupVersion
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	config.UserAgent = "ztun-agent"
	config.AcceptContentTypes = "application/vnd.kubernetes.protobuf,application/json"
	config.QPS, config.Burst = 50, 200 // a namespace of two hundred pods is labelled
	api, err := rest.RESTClientFor(config)
	if err != nil {
		return nil, err
	}
	config = rest.CopyConfig(config)
	config.APIPath, config.GroupVersion = "/apis", &appsv1.SchemeGroupVersion
	apps, err := rest.RESTClientFor(config)
	if err != nil {
		return nil, err
	}
	c := &cluster{api: api, apps: apps, node: node, changed: make(chan struct{}, 1),
		queue: workqueue.NewTypedRateLimitingQueue(
			workqueue.NewTypedItemExponentialFailureRateLimiter[agent.Ref](firstPause, longestPause))}
	c.pods = cache.NewSharedIndexInformer(cache.NewListWatchFromClient(api, "pods", "",
		fields.OneTermEqualSelector("spec.nodeName", node)), &corev1.Pod{}, 0,
		cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc})
	c.namespaces = cache.NewSharedIndexInformer(cache.NewListWatchFromClient(api, "namespaces", "",
		fields.Everything()), &corev1.Namespace{}, 0, nil)
	if err := c.pods.SetTransform(lean); err != nil {
		return nil, err
	}
	if err := c.namespaces.SetTransform(lean); err != nil {
		return nil, err
	}
	if _, err := c.pods.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    c.podChanged,
		UpdateFunc: func(_, pod any) { c.podChanged(pod) },
		DeleteFunc: c.podChanged,
	}); err != nil {
		return nil, err
	}
	_, err = c.namespaces.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    c.namespaceChanged,
		UpdateFunc: func(_, ns any) { c.namespaceChanged(ns) },
		DeleteFunc: func(any) { c.change() },
	})
	if err != nil {
		return nil, err
	}
	err = c.set.init(cache.NewListWatchFromClient(apps, "daemonsets", namespace,
		fields.OneTermEqualSelector("metadata.name", set)))
	c.broadcaster = record.NewBroadcaster()
	c.recorder = c.broadcaster.NewRecorder(scheme, corev1.EventSource{Component: "ztun-agent", Host: node})
	return c, err
}

// ownSet follows the agent's own DaemonSet, whose end is that of ztun on the node. It is watched rather than asked for:
// whoever takes an installation away may take the agent's rights first.
type ownSet struct {
	informer cache.SharedIndexInformer
	gone     chan struct{} // closed when it is, or is being, deleted with its pods

	orphaned atomic.Bool // its pods are to stay (kubectl delete --cascade=orphan)
	once     sync.Once
}

func (s *ownSet) init(from cache.ListerWatcher) error {
	s.gone = make(chan struct{})
	s.informer = cache.NewSharedIndexInformer(from, &appsv1.DaemonSet{}, 0, nil)
	if err := s.informer.SetTransform(lean); err != nil {
		return err
	}
	_, err := s.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    s.seen,
		UpdateFunc: func(_, set any) { s.seen(set) },
		DeleteFunc: func(o any) {
			// One that went while the watch was away may have left its pods: the agent's own end will tell.
			if _, missed := o.(cache.DeletedFinalStateUnknown); !missed {
				s.end()
			}
		},
	})
	return err
}

func (s *ownSet) seen(o any) {
	set, ok := o.(*appsv1.DaemonSet)
	switch {
	case !ok:
	case set.DeletionTimestamp == nil:
		s.orphaned.Store(false) // also one that was made anew
	case orphans(set):
		s.orphaned.Store(true) // which stays so when this finalizer goes before another
	default:
		s.end()
	}
}

// orphans reports whether a DaemonSet that is being deleted leaves its pods.
func orphans(set *appsv1.DaemonSet) bool {
	return slices.Contains(set.Finalizers, metav1.FinalizerOrphanDependents)
}

func (s *ownSet) end() {
	if !s.orphaned.Load() {
		s.once.Do(func() { close(s.gone) })
	}
}

// lean drops what is not needed of an object, before it is kept.
func lean(o any) (any, error) {
	switch o := o.(type) {
	case *corev1.Pod:
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: o.Name, Namespace: o.Namespace, UID: o.UID, Labels: o.Labels,
				Annotations: o.Annotations, ResourceVersion: o.ResourceVersion},
			Spec:   corev1.PodSpec{HostNetwork: o.Spec.HostNetwork, ServiceAccountName: o.Spec.ServiceAccountName},
			Status: corev1.PodStatus{Phase: o.Status.Phase, PodIP: o.Status.PodIP},
		}, nil
	case *corev1.Namespace:
		return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: o.Name, Labels: o.Labels,
			ResourceVersion: o.ResourceVersion}}, nil
	case *appsv1.DaemonSet:
		return &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Name: o.Name, Namespace: o.Namespace,
			ResourceVersion: o.ResourceVersion, DeletionTimestamp: o.DeletionTimestamp, Finalizers: o.Finalizers}}, nil
	}
	return o, nil // the end of an object that was missed
}

// change says that something has changed.
func (c *cluster) change() {
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

func (c *cluster) podChanged(o any) {
	c.change()
	if gone, ok := o.(cache.DeletedFinalStateUnknown); ok {
		o = gone.Obj
	}
	if p, ok := o.(*corev1.Pod); ok {
		c.queue.Add(agent.Ref{Namespace: p.Namespace, Name: p.Name})
	}
}

func (c *cluster) namespaceChanged(o any) {
	c.change()
	ns, ok := o.(*corev1.Namespace)
	if !ok {
		return
	}
	pods, err := c.pods.GetIndexer().ByIndex(cache.NamespaceIndex, ns.Name)
	if err != nil {
		return // there is such an index
	}
	for _, p := range pods {
		c.podChanged(p)
	}
}

// all are the pods of this node, and the labels of all namespaces.
func (c *cluster) all() (pods []agent.Pod, namespaces map[string]map[string]string) {
	for _, o := range c.pods.GetStore().List() {
		pods = append(pods, facts(o.(*corev1.Pod)))
	}
	namespaces = map[string]map[string]string{}
	for _, o := range c.namespaces.GetStore().List() {
		ns := o.(*corev1.Namespace)
		namespaces[ns.Name] = ns.Labels
	}
	return pods, namespaces
}

// fate is what becomes of the agent's own DaemonSet.
type fate uint8

const (
	stays fate = iota
	going      // it is gone, or on its way
	// nobody tells us: the agent's account or its rights are gone, which go with the whole or are mended soon
	untold
)

// fate asks for it. An API server that does not answer does not say that it goes.
func (c *cluster) fate(ctx context.Context, namespace, name string) fate {
	if c.set.orphaned.Load() {
		return stays
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var set appsv1.DaemonSet
	err := c.apps.Get().Namespace(namespace).Resource("daemonsets").Name(name).Do(ctx).Into(&set)
	switch {
	case apierrors.IsNotFound(err):
		return going
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		return untold
	case err == nil && set.DeletionTimestamp != nil && !orphans(&set):
		return going
	}
	return stays
}

func facts(p *corev1.Pod) agent.Pod {
	account := p.Spec.ServiceAccountName
	if account == "" {
		account = "default"
	}
	return agent.Pod{UID: string(p.UID), Namespace: p.Namespace, Name: p.Name, ServiceAccount: account,
		Labels: p.Labels, Annotations: p.Annotations, HostNetwork: p.Spec.HostNetwork,
		Ended: p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed, HasIP: p.Status.PodIP != ""}
}

// Pod implements agent.Cluster.
func (c *cluster) Pod(ref agent.Ref) (agent.Pod, map[string]string, bool) {
	o, ok, err := c.pods.GetStore().GetByKey(ref.String())
	if err != nil || !ok {
		return agent.Pod{}, nil, false
	}
	var labels map[string]string
	if ns, ok, err := c.namespaces.GetStore().GetByKey(ref.Namespace); err == nil && ok {
		labels = ns.(*corev1.Namespace).Labels
	}
	return facts(o.(*corev1.Pod)), labels, true
}

// Fetch implements agent.Cluster.
func (c *cluster) Fetch(ctx context.Context, ref agent.Ref) (agent.Pod, map[string]string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var p corev1.Pod
	if err := c.api.Get().Namespace(ref.Namespace).Resource("pods").Name(ref.Name).Do(ctx).Into(&p); err != nil {
		return agent.Pod{}, nil, known(err)
	}
	var ns corev1.Namespace
	if err := c.api.Get().Resource("namespaces").Name(ref.Namespace).Do(ctx).Into(&ns); err != nil {
		return agent.Pod{}, nil, known(err)
	}
	return facts(&p), ns.Labels, nil
}

// known turns the API server's word for what it does not have into ours.
func known(err error) error {
	if apierrors.IsNotFound(err) {
		return fmt.Errorf("%w: %w", agent.ErrNotFound, err)
	}
	return err
}

// Annotate implements agent.Cluster. Of what may change a pod's annotations, pods/status can do least else.
func (c *cluster) Annotate(ctx context.Context, p agent.Pod, value string) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var set any
	if value != "" {
		set = value
	}
	// With its uid: not another pod of that name.
	b, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": p.UID,
		"annotations": map[string]any{agent.AnnotationRedirected: set}}})
	if err != nil {
		return err
	}
	err = c.api.Patch(types.MergePatchType).Namespace(p.Namespace).Resource("pods").Name(p.Name).SubResource("status").
		Body(b).Do(ctx).Error()
	if apierrors.IsConflict(err) {
		return fmt.Errorf("%w: %w", agent.ErrNotFound, err)
	}
	return known(err)
}

// Warn implements agent.Cluster. The recorder joins events that are alike, and drops those beyond its rate.
func (c *cluster) Warn(p agent.Pod, reason, text string) {
	c.recorder.Event(&corev1.ObjectReference{Kind: "Pod", APIVersion: "v1", Namespace: p.Namespace, Name: p.Name,
		UID: types.UID(p.UID)}, corev1.EventTypeWarning, reason, text)
}

// Again implements agent.Cluster.
func (c *cluster) Again(ref agent.Ref) { c.queue.Add(ref) }

// Later implements agent.Cluster.
func (c *cluster) Later(ref agent.Ref) { c.queue.AddRateLimited(ref) }

// sink is where events go: record.EventSink.
type sink struct {
	ctx context.Context
	api *rest.RESTClient
}

func (s sink) do(r *rest.Request, e *corev1.Event) (*corev1.Event, error) {
	ctx, cancel := context.WithTimeout(s.ctx, callTimeout)
	defer cancel()
	var got corev1.Event
	err := r.Namespace(e.Namespace).Resource("events").Do(ctx).Into(&got)
	return &got, err
}

// Create implements record.EventSink.
func (s sink) Create(e *corev1.Event) (*corev1.Event, error) { return s.do(s.api.Post().Body(e), e) }

// Update implements record.EventSink.
func (s sink) Update(e *corev1.Event) (*corev1.Event, error) {
	return s.do(s.api.Put().Name(e.Name).Body(e), e)
}

// Patch implements record.EventSink.
func (s sink) Patch(e *corev1.Event, data []byte) (*corev1.Event, error) {
	return s.do(s.api.Patch(types.StrategicMergePatchType).Name(e.Name).Body(data), e)
}
