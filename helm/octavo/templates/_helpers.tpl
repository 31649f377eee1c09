{{- define "octavo.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* The prefix of the names of objects; short enough for the suffixes that the templates append. */}}
{{- define "octavo.fullname" -}}
{{- $name := include "octavo.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "octavo.operatorName" -}}
{{ include "octavo.fullname" . }}-operator
{{- end }}

{{/* A Service's name begins with a letter, which a release's need not. */}}
{{- define "octavo.serviceName" -}}
{{- $name := include "octavo.operatorName" . }}
{{- if regexMatch "^[0-9]" $name }}octavo-{{ end }}{{ $name }}
{{- end }}

{{- define "octavo.serviceAccountName" -}}
{{- default (include "octavo.operatorName" .) .Values.serviceAccount.name }}
{{- end }}

{{/* What the operator's pod is selected by; a Deployment's selector cannot change, so neither can this. */}}
{{- define "octavo.selectorLabels" -}}
app.kubernetes.io/name: {{ include "octavo.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "octavo.labels" -}}
{{ include "octavo.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* An image by digest if there is one, else by tag. Takes {image, context}. */}}
{{- define "octavo.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ default .context.Chart.AppVersion .image.tag }}
{{- end }}
{{- end }}

{{/* Where pods of the operator's image may run, and with what right they pull it. */}}
{{- define "octavo.placement" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* All that the operator may do, in the whole cluster or in each of watchNamespaces. It cannot read a Secret. */}}
{{- define "octavo.rules" -}}
- apiGroups: [serving.octavo.dev]
  resources: [inferenceservices]
  verbs: [get, list, watch]
- apiGroups: [serving.octavo.dev]
  resources: [inferenceservices/status]
  verbs: [patch]
# Where the admission plugin OwnerReferencesPermissionEnforcement is on, as in OpenShift, who makes an object that
# blocks its owner's deletion must be allowed to set the owner's finalizers. The operator sets none.
- apiGroups: [serving.octavo.dev]
  resources: [inferenceservices/finalizers]
  verbs: [update]
# Children that every service has; they go with their owner, so the operator deletes none of them.
- apiGroups: [""]
  resources: [serviceaccounts, services]
  verbs: [get, list, watch, create, patch]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch]
- apiGroups: [monitoring.coreos.com]
  resources: [podmonitors]
  verbs: [get, list, watch, create, patch]
# Children that only some services have.
- apiGroups: [""]
  resources: [configmaps, persistentvolumeclaims]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [apps]
  resources: [controllerrevisions]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [keda.sh]
  resources: [scaledobjects]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [autoscaling]
  resources: [horizontalpodautoscalers]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
# Its own events are made; those of pods are listed, because nothing else tells that a volume cannot be mounted.
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, list]
{{- end }}
