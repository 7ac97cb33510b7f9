{{/* Release names are unique in a namespace, so names that are made from them are unique too. */}}
{{- define "asyncrl.name" -}}
{{- if contains "asyncrl" .Release.Name -}}
{{- printf "%s-operator" .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-asyncrl-operator" .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The name of objects outside of all namespaces: two namespaces may each have a release of one name. */}}
{{- define "asyncrl.clusterName" -}}
{{- printf "%s:%s" .Release.Namespace (include "asyncrl.name" .) -}}
{{- end -}}

{{- define "asyncrl.selector" -}}
app.kubernetes.io/name: asyncrl-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* managed-by is not asyncrl-operator, which is the mark of the operator's own children. */}}
{{- define "asyncrl.labels" -}}
{{ include "asyncrl.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/*
The rights of the operator in a namespace. It must hold what it grants to a trainer (get and patch its report), and
some clusters ask for update on finalizers if an owner reference blocks the deletion of the owner.
*/}}
{{- define "asyncrl.rules" -}}
- apiGroups: [asyncrl.dev]
  resources: [asyncrljobs]
  verbs: [get, list, watch]
- apiGroups: [asyncrl.dev]
  resources: [asyncrljobs/status]
  verbs: [patch]
- apiGroups: [asyncrl.dev]
  resources: [asyncrljobs/finalizers]
  verbs: [update]
- apiGroups: [""]
  resources: [configmaps, serviceaccounts, services]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [apps]
  resources: [statefulsets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch, delete]
- apiGroups: [""]
  resources: [secrets]
  verbs: [create]
- apiGroups: [""]
  resources: [events]
  verbs: [get, list, create, patch]
{{- end -}}
